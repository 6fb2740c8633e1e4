// Which tile and which cluster serve a problem. Plain C++, tested on the host; the lists are those of the .cu files.
#pragma once
#include "predict.h"

// rows, rank of one CTA
#define LOWRANK_LINEAR_TILES(f) \
    f(128, 32) f(128, 64) f(128, 128) f(128, 256) f(64, 32) f(64, 64) f(64, 128) f(64, 256) f(64, 512)
// rank of one CTA, CTAs of a cluster; 128 rows
#define LOWRANK_FFN_TILES(f) f(256, 1) f(128, 2) f(64, 4) f(32, 8) f(128, 1) f(32, 4)

namespace lowrank {

// The least rank a CTA of a cluster must make so that the cluster holds `rank`; 0 if no compiled tile does. What the
// cluster holds is a whole number of the steps of the second product.
inline int rank_of_cta(int rows, int rank, int columns) {
    int best = 0;
    auto consider = [&](int tile_rows, int tile_rank, int step) {
        if (tile_rows != rows || tile_rank * columns < rank || tile_rank * columns % step != 0) return;
        if (rows * tile_rank * columns > 128 * 256) return;
        if (best == 0 || tile_rank < best) best = tile_rank;
    };
#define TILE(r, k) consider(r, k, Tile<r, k>::up_rank);
    LOWRANK_LINEAR_TILES(TILE)
#undef TILE
    return best;
}

// Zero for tile_rows or cluster means free choice: of all that serve the problem, what is predicted to be the fastest.
inline Choice choose_linear(Problem const& p, Gpu const& gpu, int tile_rows, int cluster, int weights) {
    int const wanted = larger(p.rank, 1);
    if (tile_rows != 0 || cluster != 0 || weights != 0) {
        Choice c{tile_rows != 0 ? tile_rows : wanted <= 256 ? 128 : 64, 0, cluster != 0 ? cluster : weights ? 2 : 1, weights};
        if (c.cluster != 1 && c.cluster != 2 && c.cluster != 4 && c.cluster != 8) return {};
        if (gpu.fit[c.cluster] == 0 || (weights && c.cluster != 2)) return {};
        c.rank = rank_of_cta(c.rows, wanted, c.columns());
        return c.rank == 0 ? Choice{} : c;
    }
    Choice best;
    double least = 0;
    auto consider = [&](Choice c) {
        c.rank = rank_of_cta(c.rows, wanted, c.columns());
        // A CTA without a column of its own would only help with the first product.
        bool const idle = c.columns() > 1 && (c.columns() - 1) * kColumns >= p.outer;
        if (c.rank == 0 || gpu.fit[c.cluster] == 0 || idle) return;
        double const time = predicted_us(p, c, gpu);
        if (best.rank == 0 || time < least) best = c, least = time;
    };
    for (int rows : {128, 64}) {
        for (int size : {1, 2, 4, 8}) consider({rows, 0, size, 0});
        consider({rows, 0, 2, 1});
    }
    return best;
}

// Zero for cluster means free choice, as for the linear.
inline Choice choose_ffn(Problem const& p, Gpu const& gpu, int cluster) {
    Choice best;
    double least = 0;
    auto consider = [&](Choice c) {
        if (c.rank * c.cluster < p.rank || gpu.fit[c.cluster] == 0 || (cluster != 0 && c.cluster != cluster)) return;
        double const time = predicted_us(p, c, gpu);
        if (best.rank == 0 || time < least) best = c, least = time;
    };
#define TILE(k, columns) consider({128, k, columns, 0});
    LOWRANK_FFN_TILES(TILE)
#undef TILE
    return best;
}

// Programs of the Ampere kernel that share a row tile, each with its part of the columns.
inline int ampere_splits(int rows, int columns, int processors) {
    int splits = 1;
    while (splits < 16 && ceil_div(rows, 64) * splits < processors && splits * 2 * kColumns <= columns) splits *= 2;
    return splits;
}

}  // namespace lowrank
