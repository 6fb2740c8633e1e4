// One call of an encoder: its rows in blocks, and what each block goes through.
#pragma once
#include <vector>

#include "encoder.h"

namespace lowrank::cpu {

// Rows first to last - 1 of all; the sentences that they belong to start with `sentence`.
struct Rows {
    int first, last, sentence;
    int count() const { return last - first; }
};

// Of one thread: a block of rows.
struct Local {
    Buffer<uint8_t> codes, scratch, context, neurons;
    Buffer<float> attention, outliers, words;
};

// Of one call, kept for the next.
struct Encoder::Memory {
    Buffer<float> x, first, query[2], key[2], value[2];
    std::vector<Local> locals;
    std::vector<Token> tokens;
};

// One forward pass.
struct Encoder::Pass {
    Encoder const& encoder;
    Kernels const& kernels;
    Batch const& batch;
    Memory& memory;
    ptrdiff_t stride;         // of rows of the encoder's width
    std::vector<int> starts;  // first row of each sentence, and the end
    std::vector<Rows> blocks, first_blocks;

    Pass(Encoder const& encoder, Batch const& batch, Memory& memory, int threads);

    // The batch's rows of a block, and the first layer's queries, keys and values of them.
    void begin(Rows const& rows, Local& local) const;
    // A layer after its projections, and the next one's projections, for a block.
    void advance(int index, Rows const& rows, Local& local) const;

private:
    // All memory is taken before the threads start: none of them can fail where others wait for it.
    void reserve(int threads);
    void load(Rows const& rows, Local& local) const;
    // The same of token ids.
    void embed(Rows const& rows, Local& local) const;
    void save(Rows const& rows, bool first) const;
    // Queries, keys and values of the layer for a block whose x (and codes) are there.
    void project(int index, Rows const& rows, Local& local) const;
    // x += output(attention) for a block; `rows` counts sentences if each asks for its first token only.
    void attend(int index, Rows const& rows, float* x, bool first, Local& local) const;
    // x += feed-forward(x).
    void feed(Layer const& layer, int rows, float* x, Local& local) const;
    void normalise(Norm const& norm, float* x, int rows, Encoder8Ptr const& codes, Local& local) const;
    void to(LinearPtr const& linear, void const* x, Rows const& rows, Buffer<float> const& y, ptrdiff_t y_stride, Local& local) const;
    Attention attention_of(Layer const& layer, int keys) const;
    // A head may write a vector behind its end.
    static ptrdiff_t value_stride(Layer const& layer) { return padded(layer.heads * layer.value_size + 16); }
    // x as the linear layers behind it want it: codes, or x itself.
    void const* input(Encoder8Ptr const& codes, float const* x, Local& local) const {
        return codes ? static_cast<void const*>(local.codes.data()) : x;
    }
    float* row(int r) const { return memory.x.data() + r * stride; }
};

}  // namespace lowrank::cpu
