// The activations, in float32, and the two element types' rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "lowrank.h"

namespace lowrank {

// act(z), with the limits at the infinities; NaN stays NaN. Both GELUs are -0 well above -64, so that the bound changes
// nothing but -Inf, which would give -Inf * 0.
template <int Kind>
__device__ __forceinline__ float activate(float z) {
    if constexpr (Kind == kGelu || Kind == kGeluTanh) z = z < -64.0f ? -64.0f : z;
    if constexpr (Kind == kGelu) {
        return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    } else if constexpr (Kind == kGeluTanh) {
        // 1 + tanh(u) = 2 / (1 + exp(-2 u))
        return __fdividef(z, 1.0f + __expf(-1.59576912160573071f * (z + 0.044715f * z * z * z)));
    } else if constexpr (Kind == kRelu) {
        return z < 0.0f ? 0.0f : z;  // keeps NaN, as torch does
    } else {
        return z;
    }
}

template <int Kind, class Values>
__device__ __forceinline__ void activate_as(Values& values) {
#pragma unroll
    for (int i = 0; i < int(cute::size(values)); ++i) values(i) = activate<Kind>(values(i));
}
// Each element of a fragment by the activation of that number.
template <class Values>
__device__ __forceinline__ void activate_all(int kind, Values& values) {
    if (kind == kGelu) activate_as<kGelu>(values);
    if (kind == kGeluTanh) activate_as<kGeluTanh>(values);
    if (kind == kRelu) activate_as<kRelu>(values);
}

// Two numbers, rounded to nearest, the first in the low half.
template <class E>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    if constexpr (std::is_same_v<E, cutlass::bfloat16_t>) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t&>(pair);
    } else {
        __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<uint32_t&>(pair);
    }
}

// Two neighbours at an address that is a multiple of 4.
template <class E>
__device__ __forceinline__ float2 load_pair(E const* at) {
    uint32_t const bits = __ldg(reinterpret_cast<uint32_t const*>(at));
    if constexpr (std::is_same_v<E, cutlass::bfloat16_t>)
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(bits));
    else
        return __half22float2(reinterpret_cast<__half2 const&>(bits));
}

}  // namespace lowrank
