// All layers of an encoder that normalises after each half, as one call on the real tokens of a batch.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "embeddings.h"

namespace lowrank::cpu {

// How floats are encoded for an int8 layer: multiplied column by column, rounded, shifted.
struct Encoder8 {
    Buffer<float> multiplier;
    int zero, top;
    Encoder8(float const* multipliers, int width, int zero, int top);
    Encoding view() const { return {multiplier.data(), zero, top}; }
};

// LayerNorm(x + shift); shift is what a half without matrices adds.
struct Norm {
    Buffer<float> weight, bias, shift;
    bool shifted;
    float epsilon;
    Norm(int width, float const* weight, float const* bias, float const* shift, float epsilon);
};

using LinearPtr = std::shared_ptr<Linear const>;
using Encoder8Ptr = std::shared_ptr<Encoder8 const>;

// A half that was dropped has null pointers. Encoders are there where the linear layers behind them are int8.
struct Layer {
    int heads = 0, score_size = 0, value_size = 0;
    std::vector<int> kept;  // the architecture's heads that these are, for the bias of the scores
    LinearPtr query, key, value, output;
    Encoder8Ptr input_codes, context_codes, ffn_codes;
    std::shared_ptr<Norm const> attention_norm, ffn_norm;
    LinearPtr intermediate, ffn_output;
    Activation activation = Activation::none;
    Codes neurons;  // int8: the activation's results
    // Float neurons that no byte could hold, or null.
    LinearPtr outliers, outliers_output;
};

// A batch in memory: sentence b has lengths[b] tokens at the start of its row of (batch, length).
struct Batch {
    float const* hidden;  // (batch, length, width), or null if the encoder is to embed the ids
    Ids ids;
    int64_t const* lengths;
    int count;
    int length;
    float const* bias;  // (heads, length, length), added to scores, or null
    bool first_only;    // whether the last layer's result is wanted of first tokens only
    float* result;      // (batch, length, width), zeros behind a sentence; (batch, 1, width) of first tokens
};

class Encoder {
public:
    Encoder(Kernels const& kernels, int width, std::vector<std::shared_ptr<Layer const>> layers,
            std::shared_ptr<Embeddings const> embeddings);
    // May be called by several threads at once.
    void run(Batch const& batch, int threads) const;

private:
    struct Memory;
    struct Pass;
    std::unique_ptr<Memory> borrow() const;
    void run_part(Batch const& batch, int threads, Memory& memory) const;

    Kernels const& kernels_;
    int const width_;
    std::vector<std::shared_ptr<Layer const>> const layers_;
    std::shared_ptr<Embeddings const> const embeddings_;  // or null
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Memory>> idle_;

public:
    ~Encoder();
};

}  // namespace lowrank::cpu
