// The host's half of a Hopper feed-forward. Each ffn_*_sm90a.cu file instantiates one tile and cluster.
#pragma once
#include "ffn_sm90.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace lowrank {

template <int Rank, int Columns>
void launch_ffn_sm90(Ffn const& call, int max_clusters) {
    using T = FfnTile<Rank, Columns>;
    FfnArguments a{};
    a.plan = make_ffn_plan<T>(int(call.x.rows), int(call.x.columns), int(call.up1.rows), int(call.y.columns),
                              int(call.rank1), int(call.rank2), max_clusters);
    a.x = tensor_map(call.x, call.dtype, kDepth, T::Rows / Columns);
    a.down1 = tensor_map(call.down1, call.dtype, kDepth, T::Rank);
    a.up1 = tensor_map(call.up1, call.dtype, kDepth, kNeurons);
    a.down2 = tensor_map(call.down2, call.dtype, kNeurons, T::held);
    a.up2 = tensor_map(call.up2, call.dtype, kDepth, kColumns);
    a.y = tensor_map(call.y, call.dtype, 64, 64);
    a.store_hidden = call.p.data != nullptr && call.q.data != nullptr;
    a.p = a.store_hidden ? tensor_map(call.p, call.dtype, T::hidden_chunk, T::Rows) : a.y;
    a.q = a.store_hidden ? tensor_map(call.q, call.dtype, T::hidden_chunk, T::Rows) : a.y;
    a.bias1 = call.bias1, a.bias2 = call.bias2;
    a.activation = call.activation;
    void const* const kernel = call.dtype == kBfloat16 ? reinterpret_cast<void const*>(&ffn_kernel<T, cutlass::bfloat16_t>)
                                                       : reinterpret_cast<void const*>(&ffn_kernel<T, cutlass::half_t>);
    launch_cluster(kernel, &a, a.plan.clusters, Columns, kThreads, T::shared_bytes(Columns), call.stream);
}

}  // namespace lowrank
