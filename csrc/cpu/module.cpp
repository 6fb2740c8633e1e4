// The Python module lowrank_kernels._cpu. Matrices come as (address, rows, columns, stride); what is built from them keeps
// packed copies.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "encoder.h"

namespace py = pybind11;
using namespace lowrank::cpu;

namespace {

using Described = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

std::shared_ptr<Product> bytes_product(std::string const& name, Described const& weight, uintptr_t scale, uintptr_t bias,
                                       Codes const& source) {
    auto const [address, out, in, stride] = weight;
    return std::make_shared<Product>(level(name), at<int8_t const>(address), int(out), int(in), stride,
                                     at<float const>(scale), at<float const>(bias), source);
}

std::shared_ptr<Product> floats_product(std::string const& name, Described const& weight, uintptr_t bias) {
    auto const [address, out, in, stride] = weight;
    return std::make_shared<Product>(level(name), at<float const>(address), int(out), int(in), stride, at<float const>(bias));
}

// For tests: a layer on dense matrices, through padded copies. The result is added to, stored or encoded.
void run_linear(Linear const& linear, uintptr_t x, int64_t rows, uintptr_t y, int target, Activation activation, Codes codes) {
    ptrdiff_t const in = linear.in(), out = linear.out(), x_stride = padded(in), y_stride = padded(out);
    size_t const x_size = linear.bytes() ? 1 : 4, y_size = Target(target) == Target::encode ? 1 : 4;
    Buffer<uint8_t> x_rows(rows * x_stride * x_size), y_rows(rows * y_stride * y_size), scratch(linear.scratch(int(rows)));
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(x_rows.data() + r * x_stride * x_size, at<uint8_t>(x) + r * in * x_size, in * x_size);
        std::memcpy(y_rows.data() + r * y_stride * y_size, at<uint8_t>(y) + r * out * y_size, out * y_size);
    }
    Output output;
    output.target = Target(target), output.activation = activation, output.codes = codes;
    output.data = y_rows.data(), output.stride = y_stride;
    linear.run(x_rows.data(), x_stride, int(rows), output, scratch.data());
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(at<uint8_t>(y) + r * out * y_size, y_rows.data() + r * y_stride * y_size, out * y_size);
}

// Of hidden states, or of token ids and types.
void run_encoder(Encoder const& encoder, uintptr_t hidden, uintptr_t ids, uintptr_t types, std::vector<int64_t> const& lengths,
                 int64_t length, uintptr_t bias, bool first_only, uintptr_t result, int threads) {
    Batch const batch{at<float const>(hidden), {at<int64_t const>(ids), at<int64_t const>(types)}, lengths.data(),
                      int(lengths.size()), int(length), at<float const>(bias), first_only, at<float>(result)};
    py::gil_scoped_release const release;
    encoder.run(batch, threads);
}

// How many tokens begin each row of (batch, length) booleans, or nothing if a row has none, or more after a gap.
std::optional<std::vector<int64_t>> prefix_lengths(uintptr_t keep, int64_t batch, int64_t length) {
    std::vector<int64_t> lengths;
    auto const* row = at<bool const>(keep);
    for (int64_t b = 0; b < batch; ++b, row += length) {
        int64_t const first = std::find(row, row + length, false) - row;
        if (first == 0 || std::find(row + first, row + length, true) != row + length) return std::nullopt;
        lengths.push_back(first);
    }
    return lengths;
}

Table table(Described const& described) {
    auto const [address, rows, width, stride] = described;
    if (stride != width) throw std::invalid_argument("a table is in one piece");
    return {at<float const>(address), nullptr, nullptr, rows, width};
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (Kernels const* kernels : levels()) names.push_back(kernels->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "The CPU kernels; use them through lowrank_kernels.cpu.";
    m.def("levels", &level_names, "The instruction sets that kernels were compiled for and this processor has, best first.");
    m.def("largest_code", [](std::string const& name) { return level(name).largest_code; });
    m.def("activate", [](std::string const& name, uintptr_t x, uintptr_t y, int64_t count, Activation activation) {
        level(name).activate(at<float const>(x), at<float>(y), count, activation);
    });
    m.def("prefix_lengths", &prefix_lengths);
    py::enum_<Activation>(m, "Activation")
        .value("none", Activation::none)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("relu", Activation::relu);
    py::class_<Codes>(m, "Codes").def(py::init([](float scale, int zero, int top) { return Codes{scale, zero, top}; }));
    py::class_<Product, std::shared_ptr<Product>>(m, "Product")
        .def(py::init(&bytes_product))
        .def(py::init(&floats_product));
    py::class_<Linear, std::shared_ptr<Linear>>(m, "Linear")
        .def(py::init([](std::vector<std::shared_ptr<Product>> const& products, Codes inner) {
            return std::make_shared<Linear>(std::vector<std::shared_ptr<Product const>>(products.begin(), products.end()), inner);
        }))
        .def("run", &run_linear);
    py::class_<Encoder8, std::shared_ptr<Encoder8>>(m, "Encoding").def(py::init([](uintptr_t multiplier, int width, int zero, int top) {
        return std::make_shared<Encoder8>(at<float const>(multiplier), width, zero, top);
    }));
    py::class_<Norm, std::shared_ptr<Norm>>(m, "Norm")
        .def(py::init([](int width, uintptr_t weight, uintptr_t bias, uintptr_t shift, float epsilon) {
            return std::make_shared<Norm>(width, at<float const>(weight), at<float const>(bias), at<float const>(shift), epsilon);
        }));
    py::class_<Layer, std::shared_ptr<Layer>> layer(m, "Layer");
    layer.def(py::init<>())
        .def_readwrite("heads", &Layer::heads)
        .def_readwrite("score_size", &Layer::score_size)
        .def_readwrite("value_size", &Layer::value_size)
        .def_readwrite("kept", &Layer::kept)
        .def_readwrite("activation", &Layer::activation)
        .def_readwrite("neurons", &Layer::neurons);
#define PART(name, type) \
    layer.def_property(#name, [](Layer const&) { return py::none(); }, [](Layer& self, std::shared_ptr<type> part) { self.name = part; })
    PART(query, Linear), PART(key, Linear), PART(value, Linear), PART(output, Linear);
    PART(intermediate, Linear), PART(ffn_output, Linear), PART(outliers, Linear), PART(outliers_output, Linear);
    PART(input_codes, Encoder8), PART(context_codes, Encoder8), PART(ffn_codes, Encoder8);
    PART(attention_norm, Norm), PART(ffn_norm, Norm);
#undef PART
    py::class_<Embeddings, std::shared_ptr<Embeddings>>(m, "Embeddings")
        .def(py::init([](Described const& words, uintptr_t scale, Described const& positions, std::optional<Described> const& types,
                         std::shared_ptr<Linear> up, std::shared_ptr<Norm> norm, int64_t padding) {
            Embeddings result{table(words), table(positions), types ? table(*types) : Table{}, up, norm, padding};
            if (scale != 0) {
                result.words.codes = at<int8_t const>(std::get<0>(words)), result.words.floats = nullptr;
                result.words.scale = at<float const>(scale);
            }
            return std::make_shared<Embeddings>(result);
        }));
    py::class_<Encoder>(m, "Encoder")
        .def(py::init([](std::string const& name, int width, std::vector<std::shared_ptr<Layer>> const& layers,
                         std::shared_ptr<Embeddings> embeddings) {
            return std::make_unique<Encoder>(level(name), width, std::vector<std::shared_ptr<Layer const>>(layers.begin(), layers.end()), embeddings);
        }))
        .def("run", &run_encoder);
}
