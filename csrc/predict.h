// How long a Hopper kernel is predicted to take, for choosing its tile and cluster. Plain C++, tested on the host.
//
// The constants are fitted, by least squares of relative errors, to 420 times of 56 shapes and ranks on one H100
// (benchmarks/results/gpu/h100.jsonl, keys clusters/): median error 6 %, largest 33 %; what is predicted to be the fastest
// took at most 15 % longer than what was. tests/lowrank_kernels/test_cuda_prediction.py holds the errors.
#pragma once
#include "ffn_schedule.h"

namespace lowrank {

struct Problem {
    int rows, inner, outer, rank;
    int neurons = 0;  // of a feed-forward
};

struct Choice {
    int rows = 0;     // of a row tile; 0: nothing serves the problem
    int rank = 0;     // of one CTA
    int cluster = 0;  // CTAs
    int weights = 0;  // 1: the cluster has a row tile for each CTA and shares the weights; 0: it shares one row tile

    int columns() const { return weights ? 1 : cluster; }     // CTAs that share a row tile
    int sharers() const { return cluster / columns(); }       // CTAs that a tile of the weights is multicast to
    int groups(Problem const& p) const { return ceil_div(ceil_div(p.rows, rows), sharers()); }
};

// A GPU: how many clusters of a size it holds at a time, with one CTA on an SM.
struct Gpu {
    int fit[kMaxCluster + 1] = {};
};

// For where no GPU can be asked. GPCs of 14 to 18 SMs hold fewer clusters than SMs would allow: on an H100 less than 32
// of four and less than 16 of eight.
inline Gpu typical_gpu(int processors) {
    Gpu gpu;
    gpu.fit[1] = processors, gpu.fit[2] = processors / 2;
    gpu.fit[4] = larger(processors / 4 - 2, 1), gpu.fit[8] = larger(processors / 8 - 2, 1);
    return gpu;
}

// Microseconds. A launch with its first loads; slices of H that are gathered in a cluster; a step of 64 columns of x; a
// tile of 128 columns of y; a step of 64 neurons; what else a feed-forward has.
constexpr double kLaunch = 4.15, kGather = 0.97, kStep = 0.115, kTile = 0.5, kNeuronStep = 0.34, kFfn = 15.0;
// Times what the tensor cores would need at 2048 multiplications a clock of 1.7 GHz, which overlaps with little.
constexpr double kStepProduct = 0.79, kTileProduct = 1.38, kNeuronProduct = 0.98, kMultiplications = 2048 * 1.7e3;
// For every megabyte that all CTAs together load in a step, or store in a tile.
constexpr double kLoad = 0.049, kWrite = 0.157, kMegabyte = 1e6;

// Of one round, in which `ctas` CTAs make a row tile each, or one together with their cluster.
inline double predicted_round(Problem const& p, Choice const& c, int ctas) {
    double const held = double(c.rank) * c.columns(), row_tiles = ceil_div(p.rows, c.rows);
    double const loads = double(kRowBytes) * c.rows / c.columns() + double(kRowBytes) * c.rank / c.sharers();
    double const step = kStep + kStepProduct * c.rows * c.rank * kDepth / kMultiplications + kLoad * ctas * loads / kMegabyte;
    double const stores = 2.0 * kColumns * c.rows * (p.rows / (row_tiles * c.rows));
    double const tile =
        kTile + kTileProduct * c.rows * held * kColumns / kMultiplications + kWrite * ctas * stores / kMegabyte;
    double time = ceil_div(p.inner, kDepth) * step + ceil_div(ceil_div(p.outer, kColumns), c.columns()) * tile;
    if (c.columns() > 1) time += kGather;
    if (p.neurons > 0) {
        double const neuron_step = kNeuronStep + kNeuronProduct * 2 * c.rows * held * kNeurons / kMultiplications;
        time += kFfn + ceil_div(ceil_div(p.neurons, kNeurons), c.columns()) * neuron_step;
    }
    return time;
}

// From the launch to the last store, in microseconds.
inline double predicted_us(Problem const& p, Choice const& c, Gpu const& gpu) {
    int const fit = gpu.fit[c.cluster], clusters = smaller(c.groups(p), fit);
    return kLaunch + ceil_div(c.groups(p), fit) * predicted_round(p, c, clusters * c.cluster);
}

}  // namespace lowrank
