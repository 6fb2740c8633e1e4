// Passes over rows: LayerNorm and encoding. Included by kernels_impl.h.
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

// The columns behind the width, up to a whole vector, are zero in x, shift, weight and bias, and stay so.
void normalise(float* x, ptrdiff_t stride, int rows, int width, float const* shift, float const* weight, float const* bias,
               float epsilon, uint8_t* codes, ptrdiff_t codes_stride, Encoding const& encoding) {
    RowEncoder const encoder(encoding);
    for (int r = 0; r < rows; ++r, x += stride, codes += codes == nullptr ? 0 : codes_stride) {
        F total = set(0.0f);
        for (int c = 0; c < width; c += kLanes) {
            F f = load(x + c);
            if (shift != nullptr) store(x + c, f = add(f, load(shift + c)));
            total = add(total, f);
        }
        F const mean = set(sum(total) / width);
        F squares = set(0.0f);
        for (int c = 0; c < width; c += kLanes) {
            F const d = take_first(sub(load(x + c), mean), set(0.0f), width - c);
            squares = fma(d, d, squares);
        }
        F const inverse = set(1.0f / std::sqrt(sum(squares) / width + epsilon));
        for (int c = 0; c < width; c += kLanes) {
            F const f = fma(mul(sub(load(x + c), mean), inverse), load(weight + c), load(bias + c));
            store(x + c, f);
            if (codes != nullptr) encoder(f, codes, c);
        }
    }
}

void encode(float const* x, ptrdiff_t stride, int rows, int width, uint8_t* codes, ptrdiff_t codes_stride,
            Encoding const& encoding) {
    RowEncoder const encoder(encoding);
    for (int r = 0; r < rows; ++r, x += stride, codes += codes_stride)
        for (int c = 0; c < width; c += kLanes) encoder(load(x + c), codes, c);
}

}  // namespace
