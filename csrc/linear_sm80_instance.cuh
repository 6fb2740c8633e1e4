// The host's half of the Ampere linear. Each linear_*_sm80.cu file instantiates one rank.
#pragma once
#include "launch.h"
#include "linear_sm80.cuh"

namespace lowrank {

template <int Rank>
void launch_linear_sm80(Linear const& call, int splits) {
    using T = AmpereTile<Rank>;
    AmpereArguments a = ampere_arguments<T>(call, splits);
    void const* const kernel = call.dtype == kBfloat16
                                   ? reinterpret_cast<void const*>(&ampere_linear_kernel<T, cutlass::bfloat16_t>)
                                   : reinterpret_cast<void const*>(&ampere_linear_kernel<T, cutlass::half_t>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::shared_bytes), "shared memory");
    void* arguments[] = {&a};
    check(cudaLaunchKernel(kernel, dim3(a.plan.ctas), dim3(kAmpereThreads), arguments, T::shared_bytes,
                           static_cast<cudaStream_t>(call.stream)),
          "launch");
}

}  // namespace lowrank
