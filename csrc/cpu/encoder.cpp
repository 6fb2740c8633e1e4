#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pass.h"
#include "team.h"

namespace lowrank::cpu {

namespace {

void copy(Buffer<float>& to, float const* from, int width) {
    to.take(padded(width));
    if (from != nullptr) std::copy(from, from + width, to.data());
}

// Rows for each thread that go through the encoder at a time: what is left of them between layers stays in the third cache, and
// memory does not grow with the batch.
constexpr int kPartRows = 2048;

}  // namespace

Encoder8::Encoder8(float const* multipliers, int width, int zero_code, int largest) : zero(zero_code), top(largest) {
    copy(multiplier, multipliers, width);
}

Norm::Norm(int width, float const* w, float const* b, float const* s, float e) : shifted(s != nullptr), epsilon(e) {
    copy(weight, w, width), copy(bias, b, width), copy(shift, s, width);
}

Encoder::Encoder(Kernels const& kernels, int width, std::vector<std::shared_ptr<Layer const>> layers,
                 std::shared_ptr<Embeddings const> embeddings)
    : kernels_(kernels), width_(width), layers_(std::move(layers)), embeddings_(std::move(embeddings)) {
    if (layers_.empty()) throw std::invalid_argument("an encoder has at least one layer");
    if (embeddings_ != nullptr && !embeddings_->fit(width)) throw std::invalid_argument("the embeddings have another width");
}

Encoder::~Encoder() = default;

std::unique_ptr<Encoder::Memory> Encoder::borrow() const {
    std::lock_guard<std::mutex> const lock(mutex_);
    if (idle_.empty()) return std::make_unique<Memory>();
    auto memory = std::move(idle_.back());
    idle_.pop_back();
    return memory;
}

void Encoder::run(Batch const& batch, int threads) const {
    auto memory = borrow();
    int64_t const limit = int64_t(kPartRows) * threads;
    for (int begin = 0, end = 0; begin < batch.count; begin = end) {
        int64_t rows = batch.lengths[end++];
        while (end < batch.count && rows + batch.lengths[end] <= limit) rows += batch.lengths[end++];
        Batch part = batch;
        part.count = end - begin, part.lengths += begin;
        ptrdiff_t const row = ptrdiff_t(begin) * batch.length;
        if (part.hidden != nullptr) part.hidden += row * width_;
        if (part.ids.words != nullptr) part.ids.words += row;
        if (part.ids.types != nullptr) part.ids.types += row;
        part.result += ptrdiff_t(begin) * (batch.first_only ? 1 : batch.length) * width_;
        run_part(part, threads, *memory);
    }
    std::lock_guard<std::mutex> const lock(mutex_);
    idle_.push_back(std::move(memory));
}

void Encoder::run_part(Batch const& batch, int threads, Memory& memory) const {
    Pass const pass(*this, batch, memory, threads);
    int const layers = int(layers_.size());
    threads = std::max(1, std::min(threads, int(pass.blocks.size())));
    if (!batch.first_only)
        for (int s = 0; s < batch.count; ++s) {
            ptrdiff_t const row = ptrdiff_t(s) * batch.length;
            std::fill(batch.result + (row + batch.lengths[s]) * width_, batch.result + (row + batch.length) * width_, 0.0f);
        }
    std::vector<std::atomic<int>> taken(layers + 1);
    for (auto& counter : taken) counter = 0;
    Barrier barrier(threads);
    run_team(threads, [&](int thread) {
        Local& local = memory.locals[thread];
        for (int phase = 0; phase <= layers; ++phase) {
            auto const& blocks = phase == layers && batch.first_only ? pass.first_blocks : pass.blocks;
            for (int b; (b = taken[phase]++) < int(blocks.size());) {
                if (phase == 0)
                    pass.begin(blocks[b], local);
                else
                    pass.advance(phase - 1, blocks[b], local);
            }
            if (phase < layers) barrier.wait();
        }
    });
}

}  // namespace lowrank::cpu
