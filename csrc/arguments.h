// The parameter blocks of the kernels, and how the host fills them: the plan, the matrices, and the boxes in which TMA moves
// them. `Map` is CUtensorMap in the kernels; the tests put a plain description in its place and execute the block.
#pragma once
#include "ampere_schedule.h"
#include "ffn_schedule.h"
#include "lowrank.h"

namespace lowrank {

constexpr int kThreads = 128 * (1 + kConsumers);

template <class Map>
struct LinearArguments {
    Map x, down, up, y, hidden;
    Plan plan;
    void const* bias;
    int activation;
    bool store_hidden;
};

template <class Map>
struct FfnArguments {
    Map x, down1, up1, down2, up2, y, p, q;
    FfnPlan plan;
    void const *bias1, *bias2;
    int activation;
    bool store_hidden;
};

struct AmpereArguments {
    Matrix x, down, up, y, hidden;
    void const* bias;
    AmperePlan plan;
    int activation;
};

// `make(matrix, width, height)` gives the map of boxes of that many columns and rows.
template <class T, class Map, class Make>
LinearArguments<Map> linear_arguments(Linear const& call, int cluster, int columns, int max_clusters, Make make) {
    int const weights = cluster / columns;
    LinearArguments<Map> a{};
    a.plan = make_plan<T>(int(call.x.rows), int(call.x.columns), int(call.y.columns), int(call.rank), cluster, columns,
                          max_clusters);
    a.x = make(call.x, kDepth, T::Rows / columns);
    a.down = make(call.down, kDepth, smaller(T::Rank / weights, 256));
    a.up = make(call.up, kDepth, kColumns / weights);
    a.y = make(call.y, 64, 64);
    a.store_hidden = call.hidden.data != nullptr;
    a.hidden = a.store_hidden ? make(call.hidden, T::hidden_chunk, T::Rows) : a.y;
    a.bias = call.bias;
    a.activation = call.activation;
    return a;
}

template <class T, class Map, class Make>
FfnArguments<Map> ffn_arguments(Ffn const& call, int max_clusters, Make make) {
    FfnArguments<Map> a{};
    a.plan = make_ffn_plan<T>(int(call.x.rows), int(call.x.columns), int(call.up1.rows), int(call.y.columns),
                              int(call.rank1), int(call.rank2), max_clusters);
    a.x = make(call.x, kDepth, T::Rows / T::Columns);
    a.down1 = make(call.down1, kDepth, T::Rank);
    a.up1 = make(call.up1, kDepth, kNeurons);
    a.down2 = make(call.down2, kNeurons, T::held);
    a.up2 = make(call.up2, kDepth, kColumns);
    a.y = make(call.y, 64, 64);
    a.store_hidden = call.p.data != nullptr && call.q.data != nullptr;
    a.p = a.store_hidden ? make(call.p, T::hidden_chunk, T::Rows) : a.y;
    a.q = a.store_hidden ? make(call.q, T::hidden_chunk, T::Rows) : a.y;
    a.bias1 = call.bias1, a.bias2 = call.bias2;
    a.activation = call.activation;
    return a;
}

template <class T>
AmpereArguments ampere_arguments(Linear const& call, int splits) {
    AmpereArguments a{call.x, call.down, call.up, call.y, call.hidden, call.bias, {}, call.activation};
    a.plan = make_ampere_plan<T>(int(call.x.rows), int(call.x.columns), int(call.y.columns), int(call.rank), splits);
    return a;
}

}  // namespace lowrank
