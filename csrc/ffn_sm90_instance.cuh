// The host's half of a Hopper feed-forward. Each ffn_*_sm90a.cu file instantiates one tile and cluster.
#pragma once
#include "ffn_sm90.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace lowrank {

template <int Rank, int Columns>
void launch_ffn_sm90(Ffn const& call, int max_clusters) {
    using T = FfnTile<Rank, Columns>;
    auto const make = [&](Matrix const& m, int width, int height) { return tensor_map(m, call.dtype, width, height); };
    auto a = ffn_arguments<T, CUtensorMap>(call, max_clusters, make);
    void const* const kernel = call.dtype == kBfloat16 ? reinterpret_cast<void const*>(&ffn_kernel<T, cutlass::bfloat16_t>)
                                                       : reinterpret_cast<void const*>(&ffn_kernel<T, cutlass::half_t>);
    launch_cluster(kernel, &a, a.plan.clusters, Columns, kThreads, T::shared_bytes(Columns), call.stream);
}

}  // namespace lowrank
