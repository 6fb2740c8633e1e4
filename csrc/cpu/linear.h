// Linear layers with packed weights: one product, or two with an intermediate that stays in the cache.
#pragma once
#include <memory>
#include <string>

#include "kernels.h"
#include "memory.h"

namespace lowrank::cpu {

// The level of that name. Throws std::invalid_argument where it was not compiled or the processor lacks it.
Kernels const& level(std::string const& name);

class Product {
public:
    // Signed bytes (out, in), `stride` from row to row; scale and bias of each output, bias may be null. The scale of `source`,
    // in which inputs are encoded, is taken into the scale.
    Product(Kernels const& kernels, int8_t const* weight, int out, int in, ptrdiff_t stride, float const* scale,
            float const* bias, Codes source);
    // Floats (out, in).
    Product(Kernels const& kernels, float const* weight, int out, int in, ptrdiff_t stride, float const* bias);

    Weights view() const;
    bool bytes() const { return bytes_; }
    int in() const { return in_; }
    int out() const { return out_; }
    Kernels const& kernels() const { return kernels_; }

private:
    template <class T>
    void pack(Buffer<T>& packed, T const* weight, ptrdiff_t stride, int group);
    void set_bias(float const* bias);

    Kernels const& kernels_;
    bool bytes_;
    int in_, out_;
    std::vector<Block> blocks_;
    Buffer<int8_t> byte_weights_;
    Buffer<float> float_weights_, scale_, bias_;
    Buffer<int32_t> start_;
};

struct Linear {
    // One, or down and up.
    std::vector<std::shared_ptr<Product const>> products;
    Codes inner;  // of bytes between two

    Linear(std::vector<std::shared_ptr<Product const>> products, Codes inner);
    bool bytes() const { return products.front()->bytes(); }
    int in() const { return products.front()->in(); }
    int out() const { return products.back()->out(); }
    // Bytes of scratch memory for that many rows.
    size_t scratch(int rows) const;
    // x (rows, in), bytes or floats, `stride` elements from row to row.
    void run(void const* x, ptrdiff_t stride, int rows, Output const& output, void* scratch) const;
};

}  // namespace lowrank::cpu
