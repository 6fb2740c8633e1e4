#include "pass.h"

#include <algorithm>

namespace lowrank::cpu {

namespace {

// Rows that go through a layer's row-wise steps together: what they need stays in the second cache.
constexpr int kBlockRows = 128;

}  // namespace

Encoder::Pass::Pass(Encoder const& e, Batch const& b, Memory& m, int threads)
    : encoder(e), kernels(e.kernels_), batch(b), memory(m), stride(padded(e.width_)) {
    starts.push_back(0);
    for (int s = 0; s < b.count; ++s) starts.push_back(starts.back() + int(b.lengths[s]));
    // A share for each thread, of whole sentences where they are short.
    int const rows = starts.back(), limit = std::max(1, std::min(kBlockRows, (rows + threads - 1) / threads));
    for (int s = 0; s < b.count; ++s) {
        int const from = starts[s], length = starts[s + 1] - from, parts = (length + limit - 1) / limit;
        if (!blocks.empty() && starts[s + 1] - blocks.back().first <= limit) {
            blocks.back().last = starts[s + 1];
            continue;
        }
        for (int p = 0; p < parts; ++p) blocks.push_back({from + length * p / parts, from + length * (p + 1) / parts, s});
    }
    int const each = std::max(1, std::min(kBlockRows, (b.count + threads - 1) / threads));
    for (int s = 0; s < b.count; s += each) first_blocks.push_back({s, std::min(b.count, s + each), s});
    reserve(threads);
    m.tokens.clear();
    if (b.hidden != nullptr) return;
    for (int s = 0; s < b.count; ++s) {
        ptrdiff_t const row = ptrdiff_t(s) * b.length;
        e.embeddings_->find({b.ids.words + row, b.ids.types == nullptr ? nullptr : b.ids.types + row}, int(b.lengths[s]), m.tokens);
    }
}

void Encoder::Pass::reserve(int threads) {
    int const rows = starts.back();
    size_t scores = 0, values = 0, scratch = 0, neurons = 0, outliers = 0, attention = 0, words = 0;
    int longest = 0;
    for (int s = 0; s < batch.count; ++s) longest = std::max(longest, starts[s + 1] - starts[s]);
    for (auto const& layer : encoder.layers_) {
        for (LinearPtr const& linear : {layer->query, layer->key, layer->value, layer->output, layer->intermediate,
                                        layer->ffn_output, layer->outliers, layer->outliers_output})
            if (linear) scratch = std::max(scratch, linear->scratch(kBlockRows));
        if (layer->query) {
            scores = std::max(scores, size_t(padded(layer->query->out())));
            values = std::max(values, size_t(value_stride(*layer)));
            attention = std::max(attention, kernels.attention_scratch(attention_of(*layer, longest)));
        }
        if (layer->intermediate)
            neurons = std::max(neurons, padded(layer->intermediate->out()) * (layer->ffn_output->bytes() ? 1 : sizeof(float)));
        if (layer->outliers) outliers = std::max(outliers, size_t(padded(layer->outliers->out())));
    }
    if (batch.hidden == nullptr && encoder.embeddings_->up) {
        scratch = std::max(scratch, encoder.embeddings_->up->scratch(kBlockRows));
        words = padded(encoder.embeddings_->up->in());
    }
    memory.x.take(rows * stride);
    if (batch.first_only) memory.first.take(batch.count * stride);
    for (int i = 0; i < 2; ++i) {
        memory.query[i].take(rows * scores), memory.key[i].take(rows * scores);
        memory.value[i].take(rows * values);
    }
    if (memory.locals.size() < size_t(threads)) memory.locals.resize(threads);
    for (Local& local : memory.locals) {
        local.codes.take(kBlockRows * stride);
        local.scratch.take(scratch);
        local.context.take(kBlockRows * values * sizeof(float));
        local.neurons.take(kBlockRows * neurons);
        local.attention.take(attention);
        local.outliers.take(kBlockRows * outliers);
        local.words.take(kBlockRows * words);
    }
}

Attention Encoder::Pass::attention_of(Layer const& layer, int keys) const {
    Attention call{};
    call.heads = layer.heads, call.score_size = layer.score_size, call.value_size = layer.value_size;
    call.keys = keys;
    return call;
}

void Encoder::Pass::load(Rows const& rows, Local& local) const {
    if (batch.hidden == nullptr) return embed(rows, local);
    int const width = encoder.width_;
    for (int s = rows.sentence, r = rows.first; r < rows.last; ++r) {
        while (r >= starts[s + 1]) ++s;
        float const* const from = batch.hidden + (ptrdiff_t(s) * batch.length + r - starts[s]) * width;
        std::copy(from, from + width, row(r));
    }
    Layer const& layer = *encoder.layers_[0];
    if (layer.input_codes)
        kernels.encode(row(rows.first), stride, rows.count(), width, local.codes.data(), stride, layer.input_codes->view());
}

void Encoder::Pass::embed(Rows const& rows, Local& local) const {
    Embeddings const& embeddings = *encoder.embeddings_;
    Token const* const tokens = memory.tokens.data() + rows.first;
    int const count = rows.count();
    float* const x = row(rows.first);
    if (embeddings.up) {
        int const width = embeddings.up->in();
        kernels.words(tokens, count, width, local.words.data(), padded(width));
        Output output;
        output.data = x, output.stride = stride;
        embeddings.up->run(local.words.data(), padded(width), count, output, local.scratch.data());
    } else {
        kernels.words(tokens, count, encoder.width_, x, stride);
    }
    kernels.places(tokens, count, encoder.width_, x, stride);
    normalise(*embeddings.norm, x, count, encoder.layers_[0]->input_codes, local);
}

void Encoder::Pass::save(Rows const& rows, bool first) const {
    int const width = encoder.width_;
    for (int s = rows.sentence, r = rows.first; r < rows.last; ++r) {
        if (first) {
            float const* const from = memory.first.data() + r * stride;
            if (starts[r] == starts[r + 1])
                std::fill(batch.result + ptrdiff_t(r) * width, batch.result + ptrdiff_t(r + 1) * width, 0.0f);
            else
                std::copy(from, from + width, batch.result + ptrdiff_t(r) * width);
            continue;
        }
        while (r >= starts[s + 1]) ++s;
        std::copy(row(r), row(r) + width, batch.result + (ptrdiff_t(s) * batch.length + r - starts[s]) * width);
    }
}

void Encoder::Pass::normalise(Norm const& norm, float* x, int rows, Encoder8Ptr const& codes, Local& local) const {
    kernels.normalise(x, stride, rows, encoder.width_, norm.shifted ? norm.shift.data() : nullptr, norm.weight.data(),
                      norm.bias.data(), norm.epsilon, codes ? local.codes.data() : nullptr, stride,
                      codes ? codes->view() : Encoding{});
}

void Encoder::Pass::project(int index, Rows const& rows, Local& local) const {
    Layer const& layer = *encoder.layers_[index];
    bool const last = batch.first_only && index + 1 == int(encoder.layers_.size());
    void const* const x = input(layer.input_codes, row(rows.first), local);
    if (layer.query) {
        int const p = index % 2;
        to(layer.key, x, rows, memory.key[p], padded(layer.key->out()), local);
        to(layer.value, x, rows, memory.value[p], value_stride(layer), local);
        if (!last) to(layer.query, x, rows, memory.query[p], padded(layer.query->out()), local);
    }
    if (!last) return;
    // Of first tokens: their rows, and their queries.
    for (int s = rows.sentence; s < batch.count && starts[s] < rows.last; ++s) {
        if (starts[s] < rows.first || starts[s] == starts[s + 1]) continue;
        std::copy(row(starts[s]), row(starts[s]) + stride, memory.first.data() + s * stride);
        if (!layer.query) continue;
        ptrdiff_t const offset = (starts[s] - rows.first) * stride;
        void const* const own = layer.input_codes ? static_cast<void const*>(static_cast<uint8_t const*>(x) + offset)
                                                  : static_cast<float const*>(x) + offset;
        to(layer.query, own, {s, s + 1, s}, memory.query[index % 2], padded(layer.query->out()), local);
    }
}

void Encoder::Pass::to(LinearPtr const& linear, void const* x, Rows const& rows, Buffer<float> const& y, ptrdiff_t y_stride, Local& local) const {
    Output output;
    output.data = y.data() + rows.first * y_stride, output.stride = y_stride;
    linear->run(x, stride, rows.count(), output, local.scratch.data());
}

void Encoder::Pass::attend(int index, Rows const& rows, float* x, bool first, Local& local) const {
    Layer const& layer = *encoder.layers_[index];
    int const p = index % 2;
    ptrdiff_t const scores = padded(layer.query->out()), values = value_stride(layer);
    std::vector<float const*> biases(batch.bias == nullptr ? 0 : layer.heads);
    for (int s = rows.sentence; s < batch.count; ++s) {
        int const begin = first ? s : std::max(starts[s], rows.first), end = first ? s + 1 : std::min(starts[s + 1], rows.last);
        if (begin >= rows.last) break;
        if (begin >= end || starts[s] == starts[s + 1]) continue;
        Attention call = attention_of(layer, starts[s + 1] - starts[s]);
        call.queries = end - begin;
        call.query = memory.query[p].data() + begin * scores, call.query_stride = scores;
        call.key = memory.key[p].data() + starts[s] * scores, call.key_stride = scores;
        call.value = memory.value[p].data() + starts[s] * values, call.value_stride = values;
        int const position = first ? 0 : begin - starts[s];
        for (size_t h = 0; h < biases.size(); ++h)
            biases[h] = batch.bias + (ptrdiff_t(layer.kept[h]) * batch.length + position) * batch.length;
        call.bias = biases.empty() ? nullptr : biases.data();
        call.bias_stride = batch.length;
        ptrdiff_t const place = (begin - rows.first) * values;
        call.result_stride = values;
        if (layer.context_codes)
            call.codes = local.context.data() + place, call.encoding = layer.context_codes->view();
        else
            call.result = reinterpret_cast<float*>(local.context.data()) + place;
        kernels.attend(call, local.attention.data());
    }
    Output output;
    output.target = Target::add, output.data = x, output.stride = stride;
    layer.output->run(local.context.data(), values, rows.count(), output, local.scratch.data());
}

void Encoder::Pass::feed(Layer const& layer, int rows, float* x, Local& local) const {
    Output neurons, result;
    neurons.data = local.neurons.data(), neurons.stride = padded(layer.intermediate->out());
    neurons.activation = layer.activation, neurons.codes = layer.neurons;
    neurons.target = layer.ffn_output->bytes() ? Target::encode : Target::store;
    result.target = Target::add, result.data = x, result.stride = stride;
    if (layer.outliers) {
        Output few;
        few.data = local.outliers.data(), few.stride = padded(layer.outliers->out()), few.activation = layer.activation;
        layer.outliers->run(x, stride, rows, few, local.scratch.data());
    }
    layer.intermediate->run(input(layer.ffn_codes, x, local), stride, rows, neurons, local.scratch.data());
    layer.ffn_output->run(local.neurons.data(), neurons.stride, rows, result, local.scratch.data());
    if (layer.outliers)
        layer.outliers_output->run(local.outliers.data(), padded(layer.outliers->out()), rows, result, local.scratch.data());
}

void Encoder::Pass::begin(Rows const& rows, Local& local) const {
    load(rows, local);
    project(0, rows, local);
}

void Encoder::Pass::advance(int index, Rows const& rows, Local& local) const {
    Layer const& layer = *encoder.layers_[index];
    bool const last = index + 1 == int(encoder.layers_.size()), first = last && batch.first_only;
    float* const x = first ? memory.first.data() + rows.first * stride : row(rows.first);
    if (layer.query) attend(index, rows, x, first, local);
    normalise(*layer.attention_norm, x, rows.count(), layer.ffn_codes, local);
    if (layer.intermediate) feed(layer, rows.count(), x, local);
    Encoder8Ptr const none, &next = last ? none : encoder.layers_[index + 1]->input_codes;
    normalise(*layer.ffn_norm, x, rows.count(), next, local);
    if (last)
        save(rows, first);
    else
        project(index + 1, rows, local);
}

}  // namespace lowrank::cpu
