// Passes over rows: embeddings, LayerNorm and encoding. Included by kernels_impl.h.
#pragma once

namespace {

struct RowEncoder {
    Encoding const& encoding;
    F const zero, low, high;
    explicit RowEncoder(Encoding const& e)
        : encoding(e), zero(set(float(e.zero))), low(set(0.0f)), high(set(float(e.top))) {}
    void operator()(F f, uint8_t* codes, int column) const {
        F const whole = add(round(mul(f, load(encoding.multiplier + column))), zero);
        store_bytes(codes + column, least(most(whole, low), high));
    }
};

// The sum of a row, of terms made of each vector; four at a time, so that none waits for the one before.
template <class Term, class Add>
inline float sum_of(float const* x, int width, Term term, Add add_term) {
    F totals[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    int c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes)
        repeat<4>([&](auto i) INLINE {
            totals[i.value] = add_term(term(load(x + c + i.value * kLanes), kLanes), totals[i.value]);
        });
    for (; c < width; c += kLanes) totals[0] = add_term(term(load(x + c), width - c), totals[0]);
    return sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
}

// The columns behind the width, up to a whole vector, are zero in x, shift, weight and bias, and stay so.
void normalise(float* x, ptrdiff_t stride, int rows, int width, float const* shift, float const* weight, float const* bias,
               float epsilon, uint8_t* codes, ptrdiff_t codes_stride, Encoding const& encoding) {
    RowEncoder const encoder(encoding);
    for (int r = 0; r < rows; ++r, x += stride, codes += codes == nullptr ? 0 : codes_stride) {
        if (shift != nullptr)
            for (int c = 0; c < width; c += kLanes) store(x + c, add(load(x + c), load(shift + c)));
        F const mean = set(sum_of(x, width, [](F f, int) { return f; }, [](F f, F total) { return add(f, total); }) / width);
        float const squares = sum_of(
            x, width, [&](F f, int left) { return take_first(sub(f, mean), set(0.0f), left); },
            [](F d, F total) { return fma(d, d, total); });
        F const inverse = set(1.0f / std::sqrt(squares / width + epsilon));
        for (int c = 0; c < width; c += kLanes) {
            F const f = fma(mul(sub(load(x + c), mean), inverse), load(weight + c), load(bias + c));
            store(x + c, f);
            if (codes != nullptr) encoder(f, codes, c);
        }
    }
}

// The compiler makes vectors of these.
void words(Token const* tokens, int rows, int width, float* x, ptrdiff_t stride) {
    for (int r = 0; r < rows; ++r, x += stride) {
        Token const& token = tokens[r];
        for (int c = 0; c < width; ++c) x[c] = token.codes != nullptr ? token.scale * float(token.codes[c]) : token.word[c];
    }
}

void places(Token const* tokens, int rows, int width, float* x, ptrdiff_t stride) {
    for (int r = 0; r < rows; ++r, x += stride) {
        Token const& token = tokens[r];
        for (int c = 0; c < width; ++c) x[c] += token.position[c] + (token.type != nullptr ? token.type[c] : 0.0f);
    }
}

void encode(float const* x, ptrdiff_t stride, int rows, int width, uint8_t* codes, ptrdiff_t codes_stride,
            Encoding const& encoding) {
    RowEncoder const encoder(encoding);
    for (int r = 0; r < rows; ++r, x += stride, codes += codes_stride)
        for (int c = 0; c < width; c += kLanes) encoder(load(x + c), codes, c);
}

}  // namespace
