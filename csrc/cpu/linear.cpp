#include "linear.h"

#include <stdexcept>

namespace lowrank::cpu {

namespace {

void check(bool condition, char const* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Kernels const& level(std::string const& name) {
    for (Kernels const* kernels : levels())
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("this processor or this build has no kernels for " + name);
}

// Blocks of nearly one width, so that none is left with a single vector.
template <class T>
void Product::pack(Buffer<T>& packed, T const* weight, ptrdiff_t stride, int group) {
    check(in_ > 0 && out_ > 0 && in_ <= 65536, "a product has between 1 and 65536 inputs");
    int const vectors = (out_ + kernels_.lanes - 1) / kernels_.lanes;
    int const count = (vectors + kernels_.vectors - 1) / kernels_.vectors;
    int const groups = (in_ + group - 1) / group;
    T* to = packed.take(size_t(groups) * group * vectors * kernels_.lanes);
    ptrdiff_t offset = 0;
    for (int b = 0, column = 0; b < count; ++b) {
        int const own = vectors / count + (b < vectors % count), width = own * kernels_.lanes;
        blocks_.push_back({column, own, offset});
        for (int g = 0; g < groups; ++g)
            for (int c = 0; c < width; ++c)
                for (int j = 0; j < group; ++j) {
                    bool const real = column + c < out_ && g * group + j < in_;
                    to[offset++] = real ? weight[(column + c) * stride + g * group + j] : T(0);
                }
        column += width;
    }
}

void Product::set_bias(float const* bias) {
    bias_.take(padded(out_));
    if (bias != nullptr)
        for (int c = 0; c < out_; ++c) bias_.data()[c] = bias[c];
}

Product::Product(Kernels const& kernels, int8_t const* weight, int out, int in, ptrdiff_t stride, float const* scale,
                 float const* bias, Codes source)
    : kernels_(kernels), bytes_(true), in_(in), out_(out), scale_(padded(out)), start_(padded(out)) {
    check(source.top <= kernels.largest_code,
          "the layer is calibrated for 8-bit activations, which overflow on this instruction set");
    pack(byte_weights_, weight, stride, 4);
    set_bias(bias);
    for (int c = 0; c < out; ++c) {
        int32_t sum = 0;
        for (int k = 0; k < in; ++k) sum += weight[c * stride + k];
        start_.data()[c] = -source.zero * sum;
        scale_.data()[c] = source.scale * scale[c];
    }
}

Product::Product(Kernels const& kernels, float const* weight, int out, int in, ptrdiff_t stride, float const* bias)
    : kernels_(kernels), bytes_(false), in_(in), out_(out) {
    pack(float_weights_, weight, stride, 1);
    set_bias(bias);
}

Weights Product::view() const {
    Weights weights;
    weights.in = in_, weights.out = out_, weights.bytes = bytes_;
    weights.blocks = blocks_.data(), weights.count = int(blocks_.size());
    weights.data = bytes_ ? static_cast<void const*>(byte_weights_.data()) : float_weights_.data();
    weights.start = start_.data(), weights.scale = scale_.data(), weights.bias = bias_.data();
    return weights;
}

Linear::Linear(std::vector<std::shared_ptr<Product const>> all, Codes inner_codes) : products(std::move(all)), inner(inner_codes) {
    check(products.size() == 1 || products.size() == 2, "a linear layer has one product or two");
    for (auto const& product : products) {
        check(product->bytes() == bytes(), "the products of a layer are both int8 or both float");
        check(&product->kernels() == &products[0]->kernels(), "the products of a layer are of one level");
    }
    check(products.size() == 1 || products[0]->out() == products[1]->in(), "down and up have different ranks");
}

size_t Linear::scratch(int rows) const {
    if (products.size() == 1) return 0;
    return size_t(rows) * padded(products[0]->out()) * (bytes() ? 1 : sizeof(float));
}

void Linear::run(void const* x, ptrdiff_t stride, int rows, Output const& output, void* scratch) const {
    auto const multiply = products[0]->kernels().product;
    if (products.size() == 1) return multiply(x, stride, rows, products[0]->view(), output);
    Output between;
    between.target = bytes() ? Target::encode : Target::store;
    between.data = scratch, between.stride = padded(products[0]->out()), between.codes = inner;
    multiply(x, stride, rows, products[0]->view(), between);
    multiply(scratch, between.stride, rows, products[1]->view(), output);
}

}  // namespace lowrank::cpu
