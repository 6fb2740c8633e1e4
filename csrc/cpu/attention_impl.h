// Attention of some rows of one sentence over all its rows, head by head: keys transposed once, then tiles of queries whose
// scores never leave the first cache. Included by kernels_impl.h.
#pragma once

namespace {

constexpr int kPanel = kVectors * kLanes;

inline int vectors_of(int n) { return (n + kLanes - 1) / kLanes; }
// Columns of panel p of n vectors, in vectors.
inline int panel_vectors(int n, int p) { return n - p * kVectors < kVectors ? n - p * kVectors : kVectors; }

size_t attention_scratch(Attention const& a) {
    size_t const keys = size_t(vectors_of(a.keys)) * kLanes, values = size_t(vectors_of(a.value_size)) * kLanes;
    return keys * a.score_size + values * a.keys + kRows * (keys + values) + kLanes;
}

// Keys (keys, size) of a head as panels (size, vectors).
void pack_keys(float const* key, ptrdiff_t stride, int keys, int size, float* panel) {
    int const vectors = vectors_of(keys);
    for (int p = 0; p * kVectors < vectors; ++p) {
        int const count = panel_vectors(vectors, p);
        for (int v = 0; v < count; ++v) {
            int const at = (p * kVectors + v) * kLanes;
            for (int d = 0; d < size; d += kLanes)
                transpose(key + at * stride + d, stride, keys - at, size - d, panel + (d * count + v) * kLanes, count * kLanes);
        }
        panel += size * count * kLanes;
    }
}

// Values (keys, size) of a head as panels (keys, vectors).
void pack_values(float const* value, ptrdiff_t stride, int keys, int size, float* panel) {
    int const vectors = vectors_of(size);
    for (int p = 0; p * kVectors < vectors; ++p) {
        int const count = panel_vectors(vectors, p);
        for (int k = 0; k < keys; ++k)
            for (int v = 0; v < count; ++v) {
                int const at = (p * kVectors + v) * kLanes;
                store(panel + (k * count + v) * kLanes, load_first(value + k * stride + at, size - at));
            }
        panel += keys * count * kLanes;
    }
}

// y (rows, n) = a (rows, depth) b, b in panels.
struct PanelTile {
    float const* a;
    ptrdiff_t a_stride;
    float const* b;
    int depth;
    float* y;
    ptrdiff_t y_stride;
    template <int R, int V>
    void operator()() const {
        F f[R][V];
        each<R, V>([&](int r, int v) INLINE { f[r][v] = set(0.0f); });
        multiply<R, V>(f, a, a_stride, b, depth);
        each<R, V>([&](int r, int v) INLINE { store(y + r * y_stride + v * kLanes, f[r][v]); });
    }
};

void times_panels(float const* a, ptrdiff_t a_stride, int rows, float const* b, int depth, int columns, float* y,
                  ptrdiff_t y_stride) {
    int const vectors = vectors_of(columns);
    for (int p = 0; p * kVectors < vectors; ++p) {
        int const count = panel_vectors(vectors, p);
        with_tile(rows, count, PanelTile{a, a_stride, b, depth, y + p * kPanel, y_stride});
        b += ptrdiff_t(depth) * count * kLanes;
    }
}

// exp(score - largest) of a row of scores, zeros behind its end; returns the inverse of their sum.
float softmax(float* score, int keys, float const* bias) {
    F most_of = set(-INFINITY);
    for (int k = 0; k < keys; k += kLanes) {
        F f = load(score + k);
        if (bias != nullptr) f = add(f, load_first(bias + k, keys - k));
        f = take_first(f, set(-INFINITY), keys - k);
        store(score + k, f);
        most_of = most(most_of, f);
    }
    F const top = set(largest(most_of));
    F total = set(0.0f);
    for (int k = 0; k < keys; k += kLanes) {
        F const f = take_first(exponential(sub(load(score + k), top)), set(0.0f), keys - k);
        store(score + k, f);
        total = add(total, f);
    }
    return 1.0f / sum(total);
}

// Heads go upwards: what a head writes behind its end, the next one or the row's padding takes.
void attend(Attention const& a, float* scratch) {
    int const keys = vectors_of(a.keys) * kLanes, values = vectors_of(a.value_size) * kLanes;
    float *const panel_k = scratch, *const panel_v = panel_k + ptrdiff_t(keys) * a.score_size;
    float *const scores = panel_v + ptrdiff_t(values) * a.keys, *const context = scores + ptrdiff_t(kRows) * keys;
    RowEncoder const encoder(a.encoding);
    for (int h = 0; h < a.heads; ++h) {
        pack_keys(a.key + h * a.score_size, a.key_stride, a.keys, a.score_size, panel_k);
        pack_values(a.value + h * a.value_size, a.value_stride, a.keys, a.value_size, panel_v);
        tiles(a.queries, [&](int size, int row) {
            times_panels(a.query + row * a.query_stride + h * a.score_size, a.query_stride, size, panel_k, a.score_size,
                         a.keys, scores, keys);
            float inverse[kRows];
            for (int r = 0; r < size; ++r) {
                float const* const bias = a.bias == nullptr ? nullptr : a.bias[h] + (row + r) * a.bias_stride;
                inverse[r] = softmax(scores + r * keys, a.keys, bias);
            }
            times_panels(scores, keys, size, panel_v, a.keys, a.value_size, context, values);
            for (int r = 0; r < size; ++r) {
                ptrdiff_t const at = (row + r) * a.result_stride;
                for (int c = 0; c < a.value_size; c += kLanes) {
                    F const f = mul(load(context + r * values + c), set(inverse[r]));
                    int const column = h * a.value_size + c;
                    if (a.codes != nullptr)
                        encoder(f, a.codes + at, column);
                    else
                        store(a.result + at + column, f);
                }
            }
        });
    }
}

}  // namespace
