// The Python module lowrank_kernels._cuda: addresses and numbers in, (code, message) out.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "lowrank.h"

namespace py = pybind11;
using lowrank::Matrix;

namespace {

// A matrix as Python passes it: address, rows, columns, stride.
using Described = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
Matrix matrix(Described const& d) {
    return {reinterpret_cast<void*>(std::get<0>(d)), std::get<1>(d), std::get<2>(d), std::get<3>(d)};
}
void const* pointer(uintptr_t address) { return reinterpret_cast<void const*>(address); }
py::tuple answer(lowrank::Result const& r) { return py::make_tuple(r.code, r.message); }

// The number of GPUs and, where there is none, why.
py::tuple devices() {
    int count = 0;
    cudaError_t const code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return py::make_tuple(count, "");
    cudaGetLastError();
    return py::make_tuple(0, std::string("no device: ") + cudaGetErrorString(code == cudaSuccess ? cudaErrorNoDevice : code));
}

py::tuple linear(Described const& x, Described const& down, Described const& up, uintptr_t bias, Described const& y,
                 Described const& hidden, int64_t rank, int dtype, int activation, int device, uintptr_t stream, int rows,
                 int cluster, int weights) {
    lowrank::Linear call;
    call.x = matrix(x), call.down = matrix(down), call.up = matrix(up), call.y = matrix(y), call.hidden = matrix(hidden);
    call.bias = pointer(bias), call.rank = rank, call.dtype = dtype, call.activation = activation, call.device = device;
    call.stream = reinterpret_cast<void*>(stream), call.rows = rows, call.cluster = cluster, call.weights = weights;
    return answer(lowrank::linear(call));
}

py::tuple ffn(Described const& x, Described const& down1, Described const& up1, uintptr_t bias1, Described const& down2,
              Described const& up2, uintptr_t bias2, Described const& y, Described const& p, Described const& q,
              int64_t rank1, int64_t rank2, int dtype, int activation, int device, uintptr_t stream, int cluster) {
    lowrank::Ffn call;
    call.x = matrix(x), call.down1 = matrix(down1), call.up1 = matrix(up1), call.down2 = matrix(down2);
    call.up2 = matrix(up2), call.y = matrix(y), call.p = matrix(p), call.q = matrix(q);
    call.bias1 = pointer(bias1), call.bias2 = pointer(bias2), call.rank1 = rank1, call.rank2 = rank2;
    call.dtype = dtype, call.activation = activation, call.device = device, call.cluster = cluster;
    call.stream = reinterpret_cast<void*>(stream);
    return answer(lowrank::ffn(call));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA C++ kernels; use them through backend=\"cuda\" of lowrank_kernels.";
    std::vector<std::string> archs;
#ifdef LOWRANK_SM80
    archs.push_back("80");
#endif
#ifdef LOWRANK_SM90a
    archs.push_back("90a");
#endif
    m.attr("archs") = py::cast(archs);
    m.def("devices", &devices);
    m.def("linear", &linear);
    m.def("ffn", &ffn);
}
