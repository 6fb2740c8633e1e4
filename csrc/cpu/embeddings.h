// What an encoder's first layer reads: LayerNorm(word + position + token type) of every token.
#pragma once
#include "linear.h"

namespace lowrank::cpu {

struct Norm;

// Rows of a matrix, read where they are; `codes` with `scale` of each row, or `floats`.
struct Table {
    float const* floats = nullptr;
    int8_t const* codes = nullptr;
    float const* scale = nullptr;
    int64_t rows = 0, width = 0;
};

// Token ids and types of a batch, (batch, length) each; types may be null, for type 0.
struct Ids {
    int64_t const* words = nullptr;
    int64_t const* types = nullptr;
};

struct Embeddings {
    Table words, positions, types;  // types may be empty
    // Where words are factored: from a row of the table to the width.
    std::shared_ptr<Linear const> up;
    std::shared_ptr<Norm const> norm;
    // RoBERTa's: tokens that are not this word are counted from the position behind it, and it stands at its own. Else -1.
    int64_t padding = -1;

    // Whether everything has the encoder's width: rows are read by address.
    bool fit(int width) const;
    // The rows that each of `count` tokens of a sentence adds up, appended to `tokens`. Throws std::out_of_range.
    void find(Ids const& ids, int count, std::vector<Token>& tokens) const;
};

}  // namespace lowrank::cpu
