// lowrank_linear on Hopper: the machine that schedule.h's programs drive, and the kernel around it. See README.md.
#pragma once
#include <cute/tensor.hpp>

#include "activation.cuh"
#include "arguments.h"
#include "hopper.cuh"

namespace lowrank {

constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// The layouts of wgmma agree with `swizzled`, which the epilogue and the tests use.
template <int Pitch, class Atom>
constexpr bool same_swizzle(Atom atom) {
    auto plain = atom.layout_b();
    for (int row = 0; row < 8; ++row)
        for (int column = 0; column < Pitch / 2; column += 8)
            if (atom.layout_a()(int(plain(row, column)) * 2) != swizzled(row, column * 2, Pitch)) return false;
    return true;
}

// A tile in shared memory as wgmma reads it: `rows` of 64 (or 32) elements of the contracted dimension.
template <class E, int Rows, int Pitch>
__device__ __forceinline__ auto shared_tile(char* at) {
    using namespace cute;
    using Atom = std::conditional_t<Pitch == 128, GMMA::Layout_K_SW128_Atom<E>, GMMA::Layout_K_SW64_Atom<E>>;
    auto layout = tile_to_shape(Atom{}, Shape<Int<Rows>, Int<Pitch / 2>>{});
    return make_tensor(make_smem_ptr(reinterpret_cast<E*>(at)), layout);
}

// The wgmma of one warpgroup: 64 rows, N columns, both operands from shared memory, contracted dimension contiguous.
template <class E, int N>
__device__ __forceinline__ auto product() {
    using namespace cute;
    return make_tiled_mma(
        GMMA::ss_op_selector<E, E, float, Shape<_64, Int<N>, _16>, GMMA::Major::K, GMMA::Major::K>());
}

// acc (64 x N) += a (64 x depth) b (N x depth)^T; b starts `b_offset` steps of 16 into its tile.
template <class E, int N, int PitchA, class Accumulator>
__device__ __forceinline__ void multiply(Accumulator& acc, char* a, char* b, int b_offset) {
    using namespace cute;
    auto mma = product<E, N>();
    auto mine = mma.get_slice(0);
    Tensor fa = mine.make_fragment_A(mine.partition_A(shared_tile<E, 64, PitchA>(a)));
    Tensor fb = mine.make_fragment_B(mine.partition_B(shared_tile<E, N, 128>(b)));
    CUTE_UNROLL
    for (int k = 0; k < size<2>(fa); ++k) cute::gemm(mma, fa(_, _, k), fb(_, _, k + b_offset), acc);
}

template <class E, int N>
__device__ __forceinline__ auto accumulator() {
    return cute::partition_fragment_C(product<E, N>(), cute::Shape<cute::_64, cute::Int<N>>{});
}

// The producer's machine, driven by one thread. `maps` has the tensor maps in the order of Operand.
template <class T>
struct Loader {
    CUtensorMap const* const (&maps)[5];
    uint32_t base;

    __device__ uint32_t barrier(int index) const { return base + index * 8; }
    __device__ void wait_empty(int stage, uint32_t parity) { ptx::wait(barrier(kEmpty + stage), parity); }
    __device__ void expect(int stage, int bytes) { ptx::expect(barrier(kFull + stage), bytes); }
    __device__ void wait_ring_free(uint32_t parity) { ptx::wait_for_writes(barrier(kRingFree), parity); }
    template <Operand From>
    __device__ void box(int stage, int offset, int column, int row, int, int parts) {
        uint32_t const to = base + T::ring_at + stage * T::stage_bytes + offset;
        if (parts == 1)
            ptx::load(*maps[From], to, barrier(kFull + stage), column, row);
        else
            ptx::load_multicast(*maps[From], to, barrier(kFull + stage), column, row, uint16_t((1 << parts) - 1));
    }
};

// The consumers' machine, driven by every thread of a warpgroup alike.
template <class T, class E>
struct Worker {
    CUtensorMap const &y_map, &hidden_map;
    Plan const& p;
    E const* bias;
    int activation;
    bool store_hidden;
    char* shared;
    uint32_t base;
    int rank, group, thread;  // of the cluster; of the CTA (0, 1); of the warpgroup
    decltype(accumulator<E, T::hidden_width>()) hidden;
    decltype(accumulator<E, T::out_width>()) out;
    Bias<E, T::out_width> out_bias;

    __device__ uint32_t barrier(int index) const { return base + index * 8; }
    __device__ char* stage_at(int stage) const { return shared + T::ring_at + stage * T::stage_bytes; }
    __device__ int my_rows() const { return T::row_of(group); }
    __device__ int my_columns(int width) const { return T::column_of(group, width); }
    // One thread of the warpgroup for each CTA, spread over its warps.
    template <auto Arrive = ptx::arrive_at>
    __device__ void arrive_everywhere(int index, int ctas) {
        if (thread % 16 == 0 && thread / 16 < ctas) Arrive(barrier(index), ctas == 1 ? rank : thread / 16);
    }

    __device__ void meet_group() { group == 0 ? ptx::meet<2, 128>() : ptx::meet<3, 128>(); }

    __device__ void wait_full(int stage, uint32_t parity) { ptx::wait(barrier(kFull + stage), parity); }
    __device__ void release(int stage) { arrive_everywhere(kEmpty + stage, p.cluster); }
    template <int N>
    __device__ void drain() {
        cute::warpgroup_wait<N>();
    }

    // Cleared rather than overwritten by the first product, so that nothing is kept alive from one tile to the next.
    __device__ void clear_hidden() { cute::clear(hidden); }
    __device__ void clear_out() { cute::clear(out); }
    __device__ void multiply_down(int stage, int) {
        char* const a = stage_at(stage) + my_rows() * kRowBytes;
        char* const b = stage_at(stage) + T::x_bytes + my_columns(T::hidden_width) * kRowBytes;
        cute::warpgroup_fence_operand(hidden);
        cute::warpgroup_arrive();
        multiply<E, T::hidden_width, 128>(hidden, a, b, 0);
        cute::warpgroup_commit_batch();
    }
    __device__ char* hidden_at(int column) const {
        return shared + T::hidden_at + (column / T::hidden_chunk * T::Rows + my_rows()) * T::hidden_pitch;
    }
    __device__ void multiply_up(int stage, int unit) {
        cute::warpgroup_fence_operand(out);
        cute::warpgroup_arrive();
        CUTE_UNROLL
        for (int done = 0; done < T::up_rank; done += T::hidden_chunk) {
            char* const b = stage_at(stage) + (done / kDepth * kColumns + my_columns(T::out_width)) * kRowBytes;
            multiply<E, T::out_width, T::hidden_pitch>(out, hidden_at(unit * T::up_rank + done), b,
                                                          done % kDepth / 16);
        }
        cute::warpgroup_commit_batch();
    }

    __device__ void expect_slices(int mine) {
        if (group == 0 && thread == 0)
#pragma unroll 1
            for (int s = 0; s < p.columns; ++s)
                if (s != mine) ptx::expect(barrier(kSlice + s), T::slice_bytes);
    }
    __device__ void wait_slice(int slice, uint32_t parity) { ptx::wait(barrier(kSlice + slice), parity); }
    __device__ void wait_hidden_free(uint32_t parity) { ptx::wait_for_writes(barrier(kHiddenFree), parity); }
    __device__ void free_hidden() { arrive_everywhere<ptx::arrive_after_writes>(kHiddenFree, p.columns); }

    __device__ void join_before_write() {
        if (group == 0 && thread == 0) ptx::store_wait();
        ptx::meet<1, 128 * kConsumers>();
    }
    __device__ void join_after_write() {
        ptx::publish();
        ptx::meet<1, 128 * kConsumers>();
    }
    // Rounds this warpgroup's part of the slice into its place. Columns beyond the rank are 0 even where x holds Inf.
    __device__ void write_hidden(int slice) { write_slice(slice, p.rank); }
    __device__ void write_slice(int slice, int rank_limit) {
        cute::warpgroup_fence_operand(hidden);
        constexpr int tile_bytes = T::Rows * T::hidden_pitch;
        int const column = my_columns(T::hidden_width), first = column % T::hidden_chunk / 8;
        uint32_t const at = base + T::hidden_at + slice * T::slice_bytes + column / T::hidden_chunk * tile_bytes +
                            my_rows() * T::hidden_pitch;
        int const left = rank_limit - slice * T::Rank - column - accumulator_column(thread, 0);
        CUTE_UNROLL
        for (int i = 0; i < T::hidden_width / 2; i += 2) {
            float const low = i / 4 * 8 < left ? hidden(i) : 0.0f;
            float const high = i / 4 * 8 + 1 < left ? hidden(i + 1) : 0.0f;
            ptx::put(at + accumulator_offset(thread, i, first, T::hidden_pitch, tile_bytes), round_pair<E>(low, high));
        }
    }
    __device__ void send_slice(int slice) {
        uint32_t const from = base + T::hidden_at + slice * T::slice_bytes;
#pragma unroll 1
        for (int peer = 0; peer < p.columns; ++peer)
            if (peer != slice) ptx::send(from, T::slice_bytes, barrier(kSlice + slice), peer);
    }
    __device__ void store_slice(CUtensorMap const& map, int slice, int row, int rank_limit) {
#pragma unroll 1
        for (int done = 0; done < T::Rank; done += T::hidden_chunk) {
            int const column = slice * T::Rank + done;
            if (column < rank_limit && row < p.rows)
                ptx::store(map, base + T::hidden_at + column / T::hidden_chunk * T::Rows * T::hidden_pitch, column, row);
        }
        ptx::store_commit();
    }
    __device__ void send_hidden(int slice, int row, int) {
        if (group == 0 && thread == 0) {
            send_slice(slice);
            if (store_hidden) store_slice(hidden_map, slice, row, p.rank);
        }
    }

    // Asked for before the product, so that the store need not wait for it.
    __device__ void load_out_bias(int first) {
        if (bias != nullptr) out_bias.load(bias, first + my_columns(T::out_width) + accumulator_column(thread, 0), p.outer);
    }
    // y: bias, activation, rounding, and out by TMA, 64 columns at a time; what lies outside y is clipped.
    __device__ void store(int row, int first) {
        uint32_t const staging = base + T::staging_at(p.columns) + group * T::staging_bytes;
        cute::warpgroup_fence_operand(out);
        if (bias != nullptr) out_bias.add(out);
        activate_all(activation, out);
        CUTE_UNROLL
        for (int part = 0; part < T::out_width / 64; ++part) {
            int const column = first + my_columns(T::out_width) + part * 64;
            if (thread == 0) ptx::store_wait();
            meet_group();
            CUTE_UNROLL
            for (int i = 0; i < 32; i += 2)
                ptx::put(staging + accumulator_offset(thread, i, 0, kRowBytes, 0),
                         round_pair<E>(out(part * 32 + i), out(part * 32 + i + 1)));
            ptx::publish();
            meet_group();
            if (thread == 0) {
                if (column < p.outer && row + my_rows() < p.rows) ptx::store(y_map, staging, column, row + my_rows());
                ptx::store_commit();
            }
        }
    }
};

// The start and the end that the Hopper kernels share: barriers are made before anybody uses them, and no CTA leaves
// while another may still write into its shared memory or arrive at its barriers. Meanwhile the tensor maps come.
template <class... Maps>
__device__ __forceinline__ void make_barriers(uint32_t base, Plan const& p, Maps const&... maps) {
    if (threadIdx.x == 0) {
        (ptx::prefetch(maps), ...);
        for (int index = 0; index < kBarriers; ++index)
            ptx::barrier_init(base + index * 8, arrivals(index, p.cluster, p.columns));
        ptx::barrier_init_visible();
    }
    __syncthreads();
    ptx::cluster_sync();
}
__device__ __forceinline__ char* aligned_shared() {
    extern __shared__ char raw[];
    uint32_t const at = cute::cast_smem_ptr_to_uint(raw);
    return raw + (1024 - at % 1024) % 1024;
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(__grid_constant__ LinearArguments<CUtensorMap> const a) {
    static_assert(same_swizzle<128>(cute::GMMA::Layout_K_SW128_Atom<E>{}), "swizzle of 128 bytes");
    static_assert(same_swizzle<64>(cute::GMMA::Layout_K_SW64_Atom<E>{}), "swizzle of 64 bytes");
    char* const shared = aligned_shared();
    uint32_t base = cute::cast_smem_ptr_to_uint(shared);
    asm volatile("" : "+r"(base));  // or it is computed again at every use
    make_barriers(base, a.plan, a.x, a.down, a.up, a.y);
    if (threadIdx.x < 128) {
        ptx::give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) {
            CUtensorMap const* const maps[5] = {&a.x, &a.down, &a.up, nullptr, nullptr};
            Loader<T> loader{maps, base};
            produce<T>(a.plan, ptx::cluster_index(), ptx::cluster_rank(), loader);
        }
    } else {
        ptx::take_registers<kConsumerRegisters>();
        Worker<T, E> worker{a.y, a.hidden, a.plan, static_cast<E const*>(a.bias), a.activation, a.store_hidden, shared,
                            base, int(ptx::cluster_rank()), int(threadIdx.x / 128) - 1, int(threadIdx.x % 128)};
        consume<T>(a.plan, ptx::cluster_index(), worker.rank, worker);
        if (worker.thread == 0) ptx::store_finish();
    }
    __syncwarp();
    ptx::cluster_sync();
}

}  // namespace lowrank
