// The program of the Ampere linear, as schedule.h is Hopper's: every thread of a CTA runs it alike.
#pragma once
#include "schedule.h"

namespace lowrank {

constexpr int kAmpereThreads = 256;
constexpr int kAmpereShared = 99 * 1024;  // what a CTA may use on compute capability 8.6 and 8.9

template <int Rank_>
struct AmpereTile {
    static constexpr int Rows = 64, Rank = Rank_, Columns = 64;
    static constexpr int Depth = 32, UpDepth = 64, Stages = 3;
    // A stage holds 32 columns of x and of down, or 64 rows of 64 columns of up.
    static constexpr int stage_bytes = larger((Rows + Rank) * Depth * 2, Columns * UpDepth * 2);
    static constexpr int hidden_bytes = Rows * Rank * 2;
    static constexpr int shared_bytes = Stages * stage_bytes + hidden_bytes;
    static_assert(shared_bytes <= kAmpereShared, "fits an L4");
    LOWRANK_HD static constexpr int stage_at(int stage) { return stage * stage_bytes; }
    // H in chunks of 64 columns.
    LOWRANK_HD static constexpr int hidden_at(int chunk) { return Stages * stage_bytes + chunk * Rows * UpDepth * 2; }
};

struct AmperePlan {
    int rows, inner, outer, rank;
    int splits;       // CTAs that share a row tile, each with its part of the columns; each makes all of H
    int ctas;
    int depth_steps;  // of 32
    int chunks;       // of 64 columns of H
    int rounds;       // tiles of 64 columns of every CTA
};

template <class T>
LOWRANK_HD AmperePlan make_ampere_plan(int rows, int inner, int outer, int rank, int splits) {
    int const tiles = ceil_div(outer, T::Columns), rounds = ceil_div(tiles, splits);
    return {rows, inner, outer, rank, splits, ceil_div(rows, T::Rows) * splits, ceil_div(inner, T::Depth),
            T::Rank / T::UpDepth, rounds};
}

// `steps` tiles through the ring: load(i, stage) starts a copy, use(i, stage) reads it. A stage is loaded again only after
// the meeting that follows its last use. A group is committed at every step, empty ones too, so that the number of
// groups in flight always tells which tile has come.
template <class T, class Machine, class Load, class Use>
LOWRANK_HD void ampere_pass(Machine& m, int steps, Load load, Use use) {
    for (int i = 0; i < T::Stages - 1; ++i) {
        if (i < steps) load(i, i);
        m.commit();
    }
    for (int i = 0; i < steps; ++i) {
        m.wait_oldest();
        m.meet();
        int const next = i + T::Stages - 1;
        if (next < steps) load(next, next % T::Stages);
        m.commit();
        use(i, i % T::Stages);
    }
    m.wait_all();
    m.meet();
}

template <class T, class Machine>
LOWRANK_HD void ampere_run(AmperePlan const& p, int cta, Machine& m) {
    int const row = cta / p.splits * T::Rows, part = cta % p.splits;
    m.clear_hidden();
    ampere_pass<T>(
        m, p.depth_steps, [&](int k, int stage) { m.load_hidden(stage, k, row); },
        [&](int k, int stage) { m.multiply_down(stage, k); });
    m.write_hidden(row, m.stores_hidden() && part == 0);
    m.meet();
    for (int round = 0; round < p.rounds; ++round) {
        int const column = (round * p.splits + part) * T::Columns;
        if (column >= p.outer) break;
        m.clear_out();
        ampere_pass<T>(
            m, p.chunks, [&](int chunk, int stage) { m.load_up(stage, chunk, column); },
            [&](int chunk, int stage) { m.multiply_up(stage, chunk); });
        m.store(row, column);
    }
}

}  // namespace lowrank
