// Products x W^T with packed weights: a tile of rows and columns stays in registers from the first input to the result.
// Included by kernels_impl.h.
#pragma once

namespace {

// body(0), ..., body(N - 1) with constants, written out: a compiler keeps an array in registers only where no loop indexes it.
#define INLINE __attribute__((always_inline))
template <int N>
struct Number {
    static constexpr int value = N;
};
template <int N, class Body>
INLINE inline void repeat(Body body) {
    if constexpr (N > 0) {
        repeat<N - 1>(body);
        body(Number<N - 1>());
    }
}
// body(r, v) for all of R rows and V vectors.
template <int R, int V, class Body>
INLINE inline void each(Body body) {
    repeat<R>([&](auto r) INLINE { repeat<V>([&](auto v) INLINE { body(r.value, v.value); }); });
}

// f * multiplier + zero as whole numbers between 0 and top. Limits come first: nothing large is converted.
struct Encoder {
    F multiplier, zero, low, high;
    explicit Encoder(Codes const& codes)
        : multiplier(set(1.0f / codes.scale)), zero(set(float(codes.zero))), low(set(0.0f)), high(set(float(codes.top))) {}
    // round(f m) + zero, as torch.quantize_per_tensor has it.
    F operator()(F f) const { return least(most(add(round(mul(f, multiplier)), zero), low), high); }
};

// Results of a row's vector into their place.
template <Target target>
inline void put(F f, Output const& output, Encoder const& encoder, ptrdiff_t place) {
    if constexpr (target == Target::encode) {
        store_bytes(static_cast<uint8_t*>(output.data) + place, encoder(f));
    } else {
        float* const y = static_cast<float*>(output.data) + place;
        store(y, target == Target::add ? add(load(y), f) : f);
    }
}

template <int R, int V, Target target>
INLINE inline void put_tile(F (&f)[R][V], Output const& output, ptrdiff_t place) {
    Encoder const encoder(output.codes);
    each<R, V>([&](int r, int v) INLINE { put<target>(f[r][v], output, encoder, place + r * output.stride + v * kLanes); });
}

// The activation of a tile, in a loop of its own: it needs the registers.
template <int R, int V>
__attribute__((noinline)) void put_activated(float const* tile, Output const& output, ptrdiff_t place) {
    Encoder const encoder(output.codes);
    auto const loop = [&](auto function) {
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                F const f = function(load(tile + (r * V + v) * kLanes));
                ptrdiff_t const at = place + r * output.stride + v * kLanes;
                if (output.target == Target::encode)
                    put<Target::encode>(f, output, encoder, at);
                else
                    put<Target::store>(f, output, encoder, at);
            }
    };
    switch (output.activation) {
        case Activation::gelu: return loop([](F x) { return gelu(x); });
        case Activation::gelu_tanh: return loop([](F x) { return gelu_tanh(x); });
        default: return loop([](F x) { return most(x, set(0.0f)); });
    }
}

template <int R, int V>
INLINE inline void finish(F (&f)[R][V], Output const& output, int row, int column) {
    ptrdiff_t const place = row * output.stride + column;
    if (output.activation != Activation::none) {
        alignas(64) float tile[R * V * kLanes];
        each<R, V>([&](int r, int v) INLINE { store(tile + (r * V + v) * kLanes, f[r][v]); });
        put_activated<R, V>(tile, output, place);
    } else if (output.target == Target::add) {
        put_tile<R, V, Target::add>(f, output, place);
    } else if (output.target == Target::store) {
        put_tile<R, V, Target::store>(f, output, place);
    } else {
        put_tile<R, V, Target::encode>(f, output, place);
    }
}

template <int R, int V>
void tile_bytes(uint8_t const* x, ptrdiff_t stride, int row, Weights const& weights, Block const& block, char const* ahead,
                Output const& output) {
    I sums[R][V];
    F f[R][V];
    each<R, V>([&](int r, int v) INLINE { sums[r][v] = load(weights.start + block.column + v * kLanes); });
    int8_t const* w = static_cast<int8_t const*>(weights.data) + block.offset;
    uint8_t const* const first = x + row * stride;
    for (int k = 0; k < weights.in; k += 4, w += V * kLanes * 4, ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
        I column[V];
        repeat<V>([&](auto v) INLINE { column[v.value] = load_codes(w + v.value * kLanes * 4); });
        repeat<R>([&](auto r) INLINE {
            I const codes = repeat_codes(first + r.value * stride + k);
            repeat<V>([&](auto v) INLINE {
                sums[r.value][v.value] = dot(sums[r.value][v.value], codes, column[v.value]);
                asm("" : "+" REGISTER(sums[r.value][v.value]));
            });
        });
    }
    repeat<V>([&](auto v) INLINE {
        int const at = block.column + v.value * kLanes;
        F const scale = load(weights.scale + at), bias = load(weights.bias + at);
        repeat<R>([&](auto r) INLINE { f[r.value][v.value] = fma(to_float(sums[r.value][v.value]), scale, bias); });
    });
    finish<R, V>(f, output, row, block.column);
}

// f += a (R, depth) b (depth, V vectors), a with `stride` from row to row, b dense.
template <int R, int V>
INLINE inline void multiply(F (&f)[R][V], float const* a, ptrdiff_t stride, float const* b, int depth) {
    for (int k = 0; k < depth; ++k, b += V * kLanes) {
        F column[V];
        repeat<V>([&](auto v) INLINE { column[v.value] = load(b + v.value * kLanes); });
        repeat<R>([&](auto r) INLINE {
            F const left = set(a[r.value * stride + k]);
            repeat<V>([&](auto v) INLINE {
                f[r.value][v.value] = fma(left, column[v.value], f[r.value][v.value]);
                asm("" : "+" REGISTER(f[r.value][v.value]));
            });
        });
    }
}

template <int R, int V>
void tile_floats(float const* x, ptrdiff_t stride, int row, Weights const& weights, Block const& block, Output const& output) {
    F f[R][V];
    each<R, V>([&](int r, int v) INLINE { f[r][v] = load(weights.bias + block.column + v * kLanes); });
    multiply<R, V>(f, x + row * stride, stride, static_cast<float const*>(weights.data) + block.offset, weights.in);
    finish<R, V>(f, output, row, block.column);
}

// Calls call(rows of the tile, first row) with tiles of at most kRows rows of nearly one size.
template <class Call>
inline void tiles(int rows, Call call) {
    int const count = (rows + kRows - 1) / kRows;
    for (int i = 0, row = 0; i < count; ++i) {
        int const size = rows / count + (i < rows % count);
        call(size, row);
        row += size;
    }
}

// Calls call with constants for r rows and v vectors.
template <int V, class Call>
inline void with_rows(int r, Call call) {
    switch (r) {
        case 1: return call.template operator()<1, V>();
        case 2: return call.template operator()<2, V>();
        case 3: return call.template operator()<3, V>();
        case 4: return call.template operator()<4, V>();
        case 5: if constexpr (kRows > 4) return call.template operator()<5, V>(); else return;
        default: if constexpr (kRows > 4) return call.template operator()<6, V>(); else return;
    }
}

template <class Call>
inline void with_tile(int r, int v, Call call) {
    switch (v) {
        case 1: return with_rows<1>(r, call);
        case 2: return with_rows<2>(r, call);
        case 3: if constexpr (kVectors > 2) return with_rows<3>(r, call); else return;
        default: if constexpr (kVectors > 2) return with_rows<4>(r, call); else return;
    }
}

struct BytesTile {
    uint8_t const* x;
    ptrdiff_t stride;
    int row;
    Weights const& weights;
    Block const& block;
    char const* ahead;
    Output const& output;
    template <int R, int V>
    void operator()() const { tile_bytes<R, V>(x, stride, row, weights, block, ahead, output); }
};

struct FloatsTile {
    float const* x;
    ptrdiff_t stride;
    int row;
    Weights const& weights;
    Block const& block;
    Output const& output;
    template <int R, int V>
    void operator()() const { tile_floats<R, V>(x, stride, row, weights, block, output); }
};

// Bytes of a block's int8 weights.
inline ptrdiff_t panel(Weights const& weights, Block const& block) { return ptrdiff_t(weights.in + 3) / 4 * 4 * block.vectors * kLanes; }

void product(void const* x, ptrdiff_t stride, int rows, Weights const& weights, Output const& output) {
    for (int b = 0; b < weights.count; ++b) {
        Block const& block = weights.blocks[b];
        // The next block's weights come into the second cache meanwhile: each tile asks for as many lines as it has steps.
        char const* ahead = static_cast<char const*>(weights.data) + (b + 1 < weights.count ? block.offset + panel(weights, block) : 0);
        tiles(rows, [&](int size, int row) {
            if (weights.bytes) {
                with_tile(size, block.vectors, BytesTile{static_cast<uint8_t const*>(x), stride, row, weights, block, ahead, output});
                ahead += (weights.in + 3) / 4 * 64;
            }
            else
                with_tile(size, block.vectors, FloatsTile{static_cast<float const*>(x), stride, row, weights, block, output});
        });
    }
}

}  // namespace
