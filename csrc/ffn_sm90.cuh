// lowrank_ffn on Hopper: the linear's machines with what the loop over neurons adds. See ffn_schedule.h and README.md.
#pragma once
#include "linear_sm90.cuh"

namespace lowrank {

// The second product of the loop: neurons (64 x 64) from registers times down2's tile (held x 64).
template <class E, int N>
__device__ __forceinline__ auto register_product() {
    using namespace cute;
    return make_tiled_mma(
        GMMA::rs_op_selector<E, E, float, Shape<_64, Int<N>, _16>, GMMA::Major::K, GMMA::Major::K>());
}

template <class T, class E>
struct FfnWorker : Worker<T, E> {
    using Base = Worker<T, E>;
    CUtensorMap const& q_map;
    FfnPlan const& plan;
    E const* bias1;
    int inner_activation;
    decltype(accumulator<E, kNeurons>()) neurons;
    decltype(accumulator<E, T::held>()) parts;
    using Fragment = cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kNeurons / 16>>;
    decltype(cute::make_tensor<E>(Fragment{})) rounded;
    Bias<E, kNeurons> neuron_bias;

    __device__ void clear_parts() { cute::clear(parts); }
    __device__ void multiply_up1(int stage) {
        cute::clear(neurons);
        cute::warpgroup_fence_operand(neurons);
        cute::warpgroup_arrive();
        // Hidden from the compiler, which would keep all sixteen descriptors in registers over the loop.
        char* hidden = this->hidden_at(0);
        asm volatile("" : "+l"(hidden));
        CUTE_UNROLL
        for (int done = 0; done < T::held; done += T::hidden_chunk)
            multiply<E, kNeurons, T::hidden_pitch>(neurons, hidden + done * T::Rows * 2,
                                                   this->stage_at(stage) + done / kDepth * kNeurons * kRowBytes,
                                                   done % kDepth / 16);
        cute::warpgroup_commit_batch();
    }
    // Asked for while the product runs that it is added to.
    __device__ void load_bias(int first) {
        if (bias1 != nullptr) neuron_bias.load(bias1, first + accumulator_column(this->thread, 0), plan.neurons);
    }
    // act(z + bias1), while down2's product of the step before runs.
    __device__ void activate_neurons() {
        cute::warpgroup_fence_operand(neurons);
        if (bias1 != nullptr) neuron_bias.add(neurons);
        activate_all(inner_activation, neurons);
        cute::warpgroup_fence_operand(neurons);
    }
    // Into the left operand of the next product: an accumulator's elements are in its order.
    __device__ void round_neurons(int first) {
        int const mine = first + accumulator_column(this->thread, 0);
        auto pairs = cute::recast<uint32_t>(rounded);
        CUTE_UNROLL
        for (int i = 0; i < kNeurons / 2; i += 2)  // neurons beyond the last are 0 even where p holds Inf
            pairs(i / 2) = round_pair<E>(neurons(i), neurons(i + 1)) & -uint32_t(mine + i / 4 * 8 < plan.neurons);
    }
    __device__ void multiply_down2(int stage) {
        using namespace cute;
        auto mma = register_product<E, T::held>();
        auto mine = mma.get_slice(0);
        Tensor b = mine.make_fragment_B(mine.partition_B(shared_tile<E, T::held, 128>(this->stage_at(stage))));
        warpgroup_fence_operand(parts);
        warpgroup_fence_operand(rounded);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < size<2>(b); ++k) cute::gemm(mma, rounded(_, _, k), b(_, _, k), parts);
        warpgroup_commit_batch();
    }

    __device__ int consumer() const { return this->group * 128 + this->thread; }
    __device__ uint32_t part_at(int rank) const { return this->base + T::ring_at + rank * T::part_bytes; }
    __device__ void arrive_parts_ready() { this->template arrive_everywhere<ptx::arrive_after_writes>(kPartsReady, T::Columns); }
    __device__ void wait_parts_ready(uint32_t parity) { ptx::wait_for_writes(this->barrier(kPartsReady), parity); }
    // To every CTA, itself included, the columns that it adds.
    __device__ void send_parts() {
        cute::warpgroup_fence_operand(parts);
        CUTE_UNROLL
        for (int to = 0; to < T::Columns; ++to) {
            uint32_t const at = ptx::at_rank(part_at(this->rank), to);
            CUTE_UNROLL
            for (int i = 0; i < T::Rank / 2; i += 4) {
                int const e = to * (T::Rank / 2) + i;
                ptx::send4(at + part_offset(consumer(), i), parts(e), parts(e + 1), parts(e + 2), parts(e + 3));
            }
        }
    }
    __device__ void arrive_parts_full() {
        ptx::fence_cluster();
        this->meet_group();
        if (this->thread % 16 == 0 && this->thread / 16 < T::Columns)
            ptx::arrive_after_writes(this->barrier(kPartsFull), this->thread / 16);
    }
    __device__ void wait_parts_full(uint32_t parity) { ptx::wait_for_writes(this->barrier(kPartsFull), parity); }
    // The sum in the order of the CTAs: the same from run to run.
    __device__ void add_parts(int) {
        CUTE_UNROLL
        for (int i = 0; i < T::Rank / 2; i += 4) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            CUTE_UNROLL
            for (int from = 0; from < T::Columns; ++from) {
                float4 const part = ptx::get4(part_at(from) + part_offset(consumer(), i));
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            this->hidden(i) = sum.x, this->hidden(i + 1) = sum.y, this->hidden(i + 2) = sum.z, this->hidden(i + 3) = sum.w;
        }
    }
    // The ring's next writer is TMA: what was read and written here by ordinary instructions comes before it.
    __device__ void free_ring() {
        ptx::publish();
        this->meet_group();
        this->template arrive_everywhere<ptx::arrive_after_writes>(kRingFree, T::Columns);
    }
    __device__ void keep_parts() {
        cute::warpgroup_fence_operand(parts);
        CUTE_UNROLL
        for (int i = 0; i < T::held / 2; ++i) this->hidden(i) = parts(i);
    }
    __device__ void write_q(int slice) { this->write_slice(slice, plan.rank2); }
    // which: 0 for p, 1 for q
    __device__ void send_hidden(int slice, int row, int which) {
        if (this->group == 0 && this->thread == 0) {
            this->send_slice(slice);
            if (this->store_hidden)
                this->store_slice(which == 0 ? this->hidden_map : q_map, slice, row, which == 0 ? plan.rank : plan.rank2);
        }
    }
};

template <class T, class E>
__global__ void __launch_bounds__(kThreads, 1) ffn_kernel(__grid_constant__ FfnArguments<CUtensorMap> const a) {
    char* const shared = aligned_shared();
    uint32_t base = cute::cast_smem_ptr_to_uint(shared);
    asm volatile("" : "+r"(base));  // or it is computed again at every use
    make_barriers(base, a.plan, a.x, a.down1, a.up1, a.down2, a.up2, a.y);
    int const rank = ptx::cluster_rank();
    if (threadIdx.x < 128) {
        ptx::give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) {
            CUtensorMap const* const maps[5] = {&a.x, &a.down1, &a.up2, &a.up1, &a.down2};
            Loader<T> loader{maps, base};
            produce_ffn<T>(a.plan, ptx::cluster_index(), rank, loader);
        }
    } else {
        ptx::take_registers<kConsumerRegisters>();
        FfnWorker<T, E> worker{{a.y, a.p, a.plan, static_cast<E const*>(a.bias2), kNone, a.store_hidden, shared, base, rank,
                                int(threadIdx.x / 128) - 1, int(threadIdx.x % 128)},
                               a.q, a.plan, static_cast<E const*>(a.bias1), a.activation};
        consume_ffn<T>(a.plan, ptx::cluster_index(), rank, worker);
        if (worker.thread == 0) ptx::store_finish();
    }
    __syncwarp();
    ptx::cluster_sync();
}

}  // namespace lowrank
