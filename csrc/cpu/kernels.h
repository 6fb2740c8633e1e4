// What each instruction set implements, as a table of functions, and the plain structures that they take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lowrank::cpu {

// Every row of a buffer is padded to this many elements, so that no kernel handles the end of a row in memory.
constexpr ptrdiff_t kPadding = 64;
inline ptrdiff_t padded(ptrdiff_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

enum class Activation : int { none, gelu, gelu_tanh, relu };

// Real value = scale * (code - zero); codes from 0 to top.
struct Codes {
    float scale = 1;
    int zero = 0;
    int top = 255;
};

// A weight matrix in blocks of columns that a tile of registers holds. Within a block, int8: groups of 4 inputs, each with
// 4 bytes a column; float: inputs, each with one number a column.
struct Block {
    int column;   // its first output
    int vectors;  // of the level's lanes
    ptrdiff_t offset;  // into the packed weights, in elements
};

// Where a product's results go: added to floats, stored as floats, or encoded as bytes.
enum class Target : int { add, store, encode };
struct Output {
    Target target = Target::store;
    Activation activation = Activation::none;
    void* data = nullptr;
    ptrdiff_t stride = 0;  // elements from row to row
    Codes codes;           // of Target::encode
};

struct Weights {
    int in = 0, out = 0;
    bool bytes = false;            // int8, else float
    Block const* blocks = nullptr;
    int count = 0;
    void const* data = nullptr;
    int32_t const* start = nullptr;  // int8: minus the zero point times the sum of each column
    float const* scale = nullptr;    // int8: of each column
    float const* bias = nullptr;
};

// What is added up for one token: its word, as floats or as scale times codes; its position; its type, which may be null.
struct Token {
    float const* word;
    int8_t const* codes;
    float scale;
    float const *position, *type;
};

// Rows of floats, and what multiplies each column before it is encoded.
struct Encoding {
    float const* multiplier = nullptr;  // balance over scale; padded
    int zero = 0, top = 255;
};

// Attention of `queries` rows over the `keys` rows of their sentence, for all heads; scores come scaled.
struct Attention {
    float const *query, *key, *value;
    ptrdiff_t query_stride, key_stride, value_stride;
    int queries, keys, heads, score_size, value_size;
    // Added to the scores of each head: rows of the queries, or null.
    float const* const* bias;
    ptrdiff_t bias_stride;
    // One of the two: floats, or codes.
    float* result;
    uint8_t* codes;
    ptrdiff_t result_stride;
    Encoding encoding;
};

struct Kernels {
    char const* name;
    int lanes, rows, vectors;
    int largest_code;  // codes above it would overflow
    // x (rows, in) of bytes or floats, as the weights are.
    void (*product)(void const* x, ptrdiff_t stride, int rows, Weights const& weights, Output const& output);
    // x -> LayerNorm(x + shift), in place; also encoded if codes is not null. shift may be null.
    void (*normalise)(float* x, ptrdiff_t stride, int rows, int width, float const* shift, float const* weight,
                      float const* bias, float epsilon, uint8_t* codes, ptrdiff_t codes_stride, Encoding const& encoding);
    // x = the words of tokens, and x += their positions and types.
    void (*words)(Token const* tokens, int rows, int width, float* x, ptrdiff_t stride);
    void (*places)(Token const* tokens, int rows, int width, float* x, ptrdiff_t stride);
    void (*encode)(float const* x, ptrdiff_t stride, int rows, int width, uint8_t* codes, ptrdiff_t codes_stride,
                   Encoding const& encoding);
    // Floats of scratch memory that attention needs, and attention.
    size_t (*attention_scratch)(Attention const& call);
    void (*attend)(Attention const& call, float* scratch);
    // y = activation(x), for tests.
    void (*activate)(float const* x, float* y, ptrdiff_t count, Activation activation);
};

// The levels that were compiled and that this processor has, best first.
std::vector<Kernels const*> const& levels();

}  // namespace lowrank::cpu
