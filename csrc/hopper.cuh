// The PTX of Hopper that the kernels use, one instruction a function: barriers, bulk copies, clusters.
// Addresses of shared memory are 32 bits; the same offset names the same place in every CTA of a cluster.
#pragma once
#include <cuda.h>
#include <cstdint>

namespace lowrank::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ int cluster_index() {
    int index;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t at_rank(uint32_t address, uint32_t rank) {
    uint32_t result;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
    return result;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_visible() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier of the CTA `rank`. What it orders is reads by wgmma before writes by TMA and bulk copies. Where
// ordinary instructions read or write what another CTA wrote or will write, `arrive_after_writes` and `wait_for_writes`
// order it at cluster scope; without a scope it would be that of one CTA (PTX ISA, "mbarrier.arrive").
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at_rank(barrier, rank)) : "memory");
}
__device__ __forceinline__ void arrive_after_writes(uint32_t barrier, uint32_t rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(at_rank(barrier, rank)) : "memory");
}
// Waits until the phase of that parity is complete.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}
__device__ __forceinline__ void wait_for_writes(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// `Threads` of the CTA meet; `Id` is 1 to 15.
template <int Id, int Threads>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}
// What this thread wrote into shared memory becomes visible to TMA, bulk copies and wgmma.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

// Brings a tensor map to where TMA reads it, before it is asked for.
__device__ __forceinline__ void prefetch(CUtensorMap const& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void load(CUtensorMap const& map, uint32_t to, uint32_t barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}
__device__ __forceinline__ void load_multicast(CUtensorMap const& map, uint32_t to, uint32_t barrier, int column, int row,
                                               uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
        "l"(&map), "r"(barrier), "h"(mask), "r"(column), "r"(row)
        : "memory");
}
__device__ __forceinline__ void store(CUtensorMap const& map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
                 "r"(column), "r"(row)
                 : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores have read their source.
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Waits until they have written their destination as well.
__device__ __forceinline__ void store_finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Copies `bytes` to the same place of another CTA, whose barrier counts them.
__device__ __forceinline__ void send(uint32_t from, uint32_t bytes, uint32_t barrier, uint32_t rank) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            at_rank(from, rank)),
        "r"(from), "r"(bytes), "r"(at_rank(barrier, rank))
        : "memory");
}
__device__ __forceinline__ void put(uint32_t to, uint32_t value) {
    asm volatile("st.shared::cta.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
// Writes into the shared memory of any CTA of the cluster; `to` is an address made by at_rank.
__device__ __forceinline__ void send4(uint32_t to, float a, float b, float c, float d) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ float4 get4(uint32_t from) {
    float4 v;
    asm volatile("ld.shared::cta.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace lowrank::ptx
