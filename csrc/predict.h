// How long a Hopper linear is predicted to take, for choosing its tile and cluster. A model, not a measurement: on an H100
// it was too optimistic about clusters at few rows. Plain C++, tested on the host.
#pragma once
#include "schedule.h"

namespace lowrank {

struct Problem {
    int rows, inner, outer, rank;
};

struct Choice {
    int rows = 0;     // of a row tile; 0: nothing serves the problem
    int rank = 0;     // of one CTA
    int cluster = 0;  // CTAs
    int weights = 0;  // 1: the cluster has a row tile for each CTA and shares the weights; 0: it shares one row tile

    int columns() const { return weights ? 1 : cluster; }  // CTAs that share a row tile
};

// Of an SM and a clock. Tensor cores: NVIDIA's H100 data sheet, 989 TFLOP/s on 132 SMs at 1.83 GHz, is 2048 multiplications
// and additions. Shared memory: 128 bytes. L2: 5.5 TB/s in published microbenchmarks, 3000 bytes a clock for all SMs, and at
// most 64 for one.
constexpr double kMultiplications = 2048, kSharedBytes = 128, kL2Bytes = 3000, kL2BytesOfOne = 64;
// Clocks, guessed: to fill the ring; for the slices of H to reach the cluster, or the own slice to be written; for a
// 128 x 128 tile of y to be rounded and stored beyond what overlaps.
constexpr double kFill = 1500, kGather = 1500, kWrite = 300, kStore = 1000;

// How many clusters run at a time. GPCs have 16 or 18 SMs, so one cluster of 4 fewer fits than SMs would allow.
inline int clusters_at_a_time(int cluster, int processors) {
    int const fit = processors / cluster - (cluster == 4 && processors >= 8 ? 1 : 0);
    return larger(fit, 1);
}

// Rounds of the persistent clusters: the last one may leave most SMs idle.
inline int waves(Problem const& p, Choice const& c, int processors) {
    int const groups = ceil_div(ceil_div(p.rows, c.rows), c.cluster / c.columns());
    return ceil_div(groups, clusters_at_a_time(c.cluster, processors));
}

// Clocks from the first load to the last store.
inline double predicted_clocks(Problem const& p, Choice const& c, int processors) {
    int const groups = ceil_div(ceil_div(p.rows, c.rows), c.cluster / c.columns());
    int const ctas = smaller(groups, clusters_at_a_time(c.cluster, processors)) * c.cluster;
    double const l2 = kL2Bytes / ctas < kL2BytesOfOne ? kL2Bytes / ctas : kL2BytesOfOne;
    double const sharers = c.cluster / c.columns();  // CTAs that a tile of the weights is multicast to
    auto const slowest = [](double a, double b) { return a > b ? a : b; };

    // The first product: 64 columns of x and down a step. Each of two warpgroups reads all of down's part, and x once.
    double const tensor1 = double(c.rows) * c.rank * kDepth / kMultiplications;
    double const shared1 = (kConsumers * c.rank + c.rows) * double(kRowBytes) / kSharedBytes;
    double const load1 = (c.rows * double(kRowBytes) / c.columns() + c.rank * double(kRowBytes) / sharers) / l2;
    double const first = ceil_div(p.inner, kDepth) * slowest(slowest(tensor1, shared1), load1);
    // The second: a tile of 128 columns of y from all of H that the cluster holds.
    double const held = double(c.rank) * c.columns();
    double const tensor2 = c.rows * held * kColumns / kMultiplications;
    double const load2 = kColumns * held * 2 / sharers / l2;
    double const tiles = ceil_div(ceil_div(p.outer, kColumns), c.columns());
    double const second = tiles * (slowest(tensor2, load2) + kStore * c.rows / 128);
    return waves(p, c, processors) * (kFill + first + (c.columns() > 1 ? kGather : kWrite) + second);
}

}  // namespace lowrank
