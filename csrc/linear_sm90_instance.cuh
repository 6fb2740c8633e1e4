// The host's half of a Hopper linear: tensor maps and launch. Each linear_*_sm90a.cu file instantiates one tile.
#pragma once
#include "launch.h"
#include "linear_sm90.cuh"
#include "tensor_map.h"

namespace lowrank {

template <int Rows, int Rank>
void launch_linear_sm90(Linear const& call, int cluster, int columns, int max_clusters) {
    using T = Tile<Rows, Rank>;
    auto const make = [&](Matrix const& m, int width, int height) { return tensor_map(m, call.dtype, width, height); };
    auto a = linear_arguments<T, CUtensorMap>(call, cluster, columns, max_clusters, make);
    void const* const kernel = call.dtype == kBfloat16
                                   ? reinterpret_cast<void const*>(&linear_kernel<T, cutlass::bfloat16_t>)
                                   : reinterpret_cast<void const*>(&linear_kernel<T, cutlass::half_t>);
    launch_cluster(kernel, &a, a.plan.clusters, cluster, kThreads, T::shared_bytes(columns), call.stream);
}

}  // namespace lowrank
