// The activations, in float32, and the two element types' rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "lowrank.h"

namespace lowrank {

// A GELU as max(z, 0) - |z| 2^tail(|z|), the tail a polynomial from the constant term on that goes on falling. The bound
// lets an infinity meet a weight of 0; NaN stays NaN.
template <int N>
__device__ __forceinline__ float gelu_of_tail(float z, float const (&tail)[N]) {
    float x, weight;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(fabsf(z)), "f"(16.0f));
    float exponent = tail[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; --i) exponent = fmaf(exponent, x, tail[i]);
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(weight) : "f"(exponent));
    return fmaf(-x, weight, fmaxf(z, 0.0f));
}

// act(z), with the limits at the infinities. The coefficients are those of tests/csrc/fit_activations.py: log2 of the
// normal distribution below -x, and of 1 / (1 + exp(2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3). Their error is below that
// of rounding to either element type.
template <int Kind>
__device__ __forceinline__ float activate(float z) {
    if constexpr (Kind == kGelu) {
        constexpr float tail[] = {-1.000270962715149f,  -1.147601842880249f,     -0.46643829345703125f, -0.04743308573961258f,
                                  0.005978054367005825f, -0.00043124353396706283f, 1.3155630767869297e-05f};
        return gelu_of_tail(z, tail);
    } else if constexpr (Kind == kGeluTanh) {
        constexpr float tail[] = {-0.9998833537101746f, -1.1544983386993408f,  -0.4430328905582428f,   -0.08034025132656097f,
                                  0.03182247653603554f, -0.009881174191832542f, 0.0011985156452283263f, -5.409676305134781e-05f};
        return gelu_of_tail(z, tail);
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

// Two neighbours at an address that is a multiple of 4, as they lie there, or zeros. Volatile, so that the load stays
// where it is written: well before its use.
template <class E>
__device__ __forceinline__ uint32_t load_pair(E const* at, bool inside) {
    uint32_t bits;
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.u32 p, %2, 0;\n"
        "mov.u32 %0, 0;\n"
        "@p ld.global.nc.u32 %0, [%1];\n}"
        : "=r"(bits)
        : "l"(at), "r"(uint32_t(inside)));
    return bits;
}
template <class E>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    if constexpr (std::is_same_v<E, cutlass::bfloat16_t>)
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(bits));
    else
        return __half22float2(reinterpret_cast<__half2 const&>(bits));
}

// The bias of a warpgroup's accumulator: two columns in every 8.
template <class E, int Columns>
struct Bias {
    uint32_t pairs[Columns / 8];

    // From column `mine` on, the thread's first, below `limit`.
    __device__ __forceinline__ void load(E const* bias, int mine, int limit) {
#pragma unroll
        for (int i = 0; i < Columns / 8; ++i) pairs[i] = load_pair(bias + mine + i * 8, mine + i * 8 < limit);
    }
    template <class Values>
    __device__ __forceinline__ void add(Values& values) const {
#pragma unroll
        for (int i = 0; i < Columns / 8; ++i) {
            float2 const add = unpack_pair<E>(pairs[i]);
            values(4 * i) += add.x, values(4 * i + 1) += add.y, values(4 * i + 2) += add.x, values(4 * i + 3) += add.y;
        }
    }
};

}  // namespace lowrank
