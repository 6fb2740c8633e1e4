// lowrank_linear on Ampere and Ada: mma.sync with cp.async, one CTA for 64 rows and a share of the columns.
//
// The same two products as on Hopper, by eight warps that all do the same: tiles of 32 columns of x and down come through
// a ring of cp.async groups and give H = x down^T in registers; H is rounded into shared memory; tiles of up come through
// the same ring's memory and give y. 92 KiB of shared memory, so that an A10, L4 or 4090 (99 KiB) has it too.
#pragma once
#include <cute/tensor.hpp>

#include "activation.cuh"
#include "arguments.h"

namespace lowrank {

// 16 bytes from global to shared memory without registers; zeros where `inside` is false.
__device__ __forceinline__ void copy16(void* to, void const* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cute::cast_smem_ptr_to_uint(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// A tile of rows of `Width` elements, its 16-byte units permuted so that ldmatrix meets no bank conflict.
template <int Rows, int Width>
__device__ __forceinline__ auto ampere_layout() {
    using namespace cute;
    using Swizzled = std::conditional_t<Width == 32, Swizzle<2, 3, 3>, Swizzle<3, 3, 3>>;
    auto atom = composition(Swizzled{}, Layout<Shape<_8, Int<Width>>, Stride<Int<Width>, _1>>{});
    return tile_to_shape(atom, Shape<Int<Rows>, Int<Width>>{});
}

// Starts the copy of a tile: rows from `row`, columns from `column` of `matrix`, zeros outside it.
template <class E, int Rows, int Width>
__device__ __forceinline__ void bring_tile(E* to, Matrix const& matrix, int row, int column) {
    auto const layout = ampere_layout<Rows, Width>();
    constexpr int units = Rows * Width / 8;
#pragma unroll
    for (int unit = threadIdx.x; unit < units; unit += kAmpereThreads) {
        int const r = unit / (Width / 8), c = unit % (Width / 8) * 8;
        bool const inside = row + r < matrix.rows && column + c < matrix.columns;
        int64_t const at = inside ? int64_t(row + r) * matrix.stride + column + c : 0;
        copy16(to + layout(r, c), static_cast<E const*>(matrix.data) + at, inside);
    }
}

template <class E>
__device__ __forceinline__ auto ampere_product() {
    using namespace cute;
    using Atom = std::conditional_t<std::is_same_v<E, cutlass::bfloat16_t>, SM80_16x8x16_F32BF16BF16F32_TN,
                                    SM80_16x8x16_F32F16F16F32_TN>;
    // Two warps along the rows, four along the columns; 32 rows and 64 columns for each step of 16 of the depth.
    return make_tiled_mma(Atom{}, Layout<Shape<_2, _4, _1>>{}, cute::Tile<_32, _64, _16>{});
}

// acc (RowsA x RowsB) += a b^T for one tile of each, both `Width` deep.
template <class E, int RowsA, int RowsB, int Width, class Accumulator>
__device__ __forceinline__ void ampere_multiply(Accumulator& acc, E* a, E* b) {
    using namespace cute;
    auto mma = ampere_product<E>();
    auto mine = mma.get_slice(threadIdx.x);
    Tensor sa = make_tensor(make_smem_ptr(a), ampere_layout<RowsA, Width>());
    Tensor sb = make_tensor(make_smem_ptr(b), ampere_layout<RowsB, Width>());
    Tensor fa = mine.partition_fragment_A(sa);
    Tensor fb = mine.partition_fragment_B(sb);
    auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, E>{}, mma);
    auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, E>{}, mma);
    auto my_a = copy_a.get_slice(threadIdx.x);
    auto my_b = copy_b.get_slice(threadIdx.x);
    Tensor from_a = my_a.partition_S(sa);
    Tensor to_a = my_a.retile_D(fa);
    Tensor from_b = my_b.partition_S(sb);
    Tensor to_b = my_b.retile_D(fb);
    CUTE_UNROLL
    for (int k = 0; k < size<2>(fa); ++k) {
        copy(copy_a, from_a(_, _, k), to_a(_, _, k));
        copy(copy_b, from_b(_, _, k), to_b(_, _, k));
        gemm(mma, fa(_, _, k), fb(_, _, k), acc);
    }
}

// The machine that ampere_schedule.h's program drives.
template <class T, class E>
struct AmpereWorker {
    AmpereArguments const& a;
    E* shared;

    using Hidden = decltype(cute::partition_fragment_C(ampere_product<E>(), cute::Shape<cute::_64, cute::Int<T::Rank>>{}));
    using Out = decltype(cute::partition_fragment_C(ampere_product<E>(), cute::Shape<cute::_64, cute::Int<T::Columns>>{}));
    Hidden hidden;
    Out out;

    __device__ E* stage_at(int stage) { return shared + T::stage_at(stage) / 2; }
    __device__ E* hidden_at(int chunk) { return shared + T::hidden_at(chunk) / 2; }
    __device__ void load_hidden(int stage, int k, int row) {
        bring_tile<E, T::Rows, T::Depth>(stage_at(stage), a.x, row, k * T::Depth);
        bring_tile<E, T::Rank, T::Depth>(stage_at(stage) + T::Rows * T::Depth, a.down, 0, k * T::Depth);
    }
    __device__ void load_up(int stage, int chunk, int column) {
        bring_tile<E, T::Columns, T::UpDepth>(stage_at(stage), a.up, column, chunk * T::UpDepth);
    }
    __device__ void commit() { copies_commit(); }
    __device__ void wait_oldest() { copies_wait<T::Stages - 2>(); }
    __device__ void wait_all() { copies_wait<0>(); }
    __device__ void meet() { __syncthreads(); }
    __device__ void clear_hidden() { cute::clear(hidden); }
    __device__ void clear_out() { cute::clear(out); }
    __device__ void multiply_down(int stage, int) {
        ampere_multiply<E, T::Rows, T::Rank, T::Depth>(hidden, stage_at(stage), stage_at(stage) + T::Rows * T::Depth);
    }
    __device__ void multiply_up(int stage, int chunk) {
        ampere_multiply<E, T::Rows, T::Columns, T::UpDepth>(out, hidden_at(chunk), stage_at(stage));
    }

    // Calls f(row, column, i) for every pair of neighbours that this thread holds; i is the first of the pair.
    template <int Width, class F>
    __device__ void each_pair(F f) {
        using namespace cute;
        auto mine = ampere_product<E>().get_slice(threadIdx.x);
        Tensor places = mine.partition_C(make_identity_tensor(Shape<_64, Int<Width>>{}));
        CUTE_UNROLL
        for (int i = 0; i < size(places); i += 2) f(int(get<0>(places(i))), int(get<1>(places(i))), i);
    }
    // Columns beyond the rank are 0 even where x holds Inf.
    __device__ void write_hidden(int row, bool store) {
        auto const layout = ampere_layout<T::Rows, T::UpDepth>();
        each_pair<T::Rank>([&](int r, int c, int i) {
            uint32_t const pair = round_pair<E>(c < a.plan.rank ? hidden(i) : 0.0f, c + 1 < a.plan.rank ? hidden(i + 1) : 0.0f);
            *reinterpret_cast<uint32_t*>(hidden_at(c / T::UpDepth) + layout(r, c % T::UpDepth)) = pair;
            if (store && row + r < a.plan.rows && c < a.hidden.columns)
                *reinterpret_cast<uint32_t*>(static_cast<E*>(a.hidden.data) + (row + r) * a.hidden.stride + c) = pair;
        });
    }
    __device__ void store(int row, int column) {
        E const* const bias = static_cast<E const*>(a.bias);
        if (bias != nullptr)
            each_pair<T::Columns>([&](int, int c, int i) {
                if (column + c >= a.plan.outer) return;
                float2 const add = unpack_pair<E>(load_pair(bias + column + c, true));
                out(i) += add.x, out(i + 1) += add.y;
            });
        activate_all(a.activation, out);
        each_pair<T::Columns>([&](int r, int c, int i) {
            if (row + r >= a.plan.rows || column + c >= a.plan.outer) return;
            *reinterpret_cast<uint32_t*>(static_cast<E*>(a.y.data) + (row + r) * a.y.stride + column + c) =
                round_pair<E>(out(i), out(i + 1));
        });
    }
    __device__ bool stores_hidden() const { return a.hidden.data != nullptr; }
};

template <class T, class E>
__global__ void __launch_bounds__(kAmpereThreads, 1) ampere_linear_kernel(__grid_constant__ AmpereArguments const a) {
    extern __shared__ __align__(1024) char raw_shared[];
    AmpereWorker<T, E> worker{a, reinterpret_cast<E*>(raw_shared)};
    ampere_run<T>(a.plan, blockIdx.x, worker);
}

}  // namespace lowrank
