// The host's half of a Hopper linear: tensor maps and launch. Each linear_*_sm90a.cu file instantiates one tile.
#pragma once
#include "launch.h"
#include "linear_sm90.cuh"
#include "tensor_map.h"

namespace lowrank {

template <int Rows, int Rank>
void launch_linear_sm90(Linear const& call, int cluster, int columns, int max_clusters) {
    using T = Tile<Rows, Rank>;
    int const weights = cluster / columns;
    LinearArguments a{};
    a.plan = make_plan<T>(int(call.x.rows), int(call.x.columns), int(call.y.columns), int(call.rank), cluster, columns,
                          max_clusters);
    a.x = tensor_map(call.x, call.dtype, kDepth, T::Rows / columns);
    a.down = tensor_map(call.down, call.dtype, kDepth, smaller(T::Rank / weights, 256));
    a.up = tensor_map(call.up, call.dtype, kDepth, kColumns / weights);
    a.y = tensor_map(call.y, call.dtype, 64, 64);
    a.store_hidden = call.hidden.data != nullptr;
    a.hidden = a.store_hidden ? tensor_map(call.hidden, call.dtype, T::hidden_chunk, T::Rows) : a.y;
    a.bias = call.bias;
    a.activation = call.activation;
    void const* const kernel = call.dtype == kBfloat16
                                   ? reinterpret_cast<void const*>(&linear_kernel<T, cutlass::bfloat16_t>)
                                   : reinterpret_cast<void const*>(&linear_kernel<T, cutlass::half_t>);
    launch_cluster(kernel, &a, a.plan.clusters, cluster, kThreads, T::shared_bytes(columns), call.stream);
}

}  // namespace lowrank
