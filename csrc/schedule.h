// Who does what when, without a word about how: tiles, plans, shared memory maps and the programs of the warps.
//
// Everything here is plain C++ that nvcc compiles for the GPU and g++ for the tests. The programs (`produce`, `consume`)
// are templates over a machine: on the GPU the machine issues TMA, wgmma and barriers (linear_sm90.cuh); in the tests
// it writes a trace, which is then run under adversarial orders. Both execute the same control flow.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LOWRANK_HD __host__ __device__ __forceinline__
#else
#define LOWRANK_HD inline
#endif

namespace lowrank {

constexpr int kDepth = 64;          // elements of the contracted dimension per row of a tile: 128 bytes, one swizzle row
constexpr int kColumns = 128;       // columns of y per tile
constexpr int kRowBytes = 128;      // bytes of a tile's row
constexpr int kConsumers = 2;       // consumer warpgroups
constexpr int kMaxCluster = 8;
constexpr int kMaxStages = 8;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kBarrierBytes = 256;  // at the start of shared memory

LOWRANK_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
LOWRANK_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
LOWRANK_HD constexpr int larger(int a, int b) { return a < b ? b : a; }
LOWRANK_HD constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Where byte `byte` of row `row` lies in a tile whose rows have `pitch` bytes (128 or 64), as TMA and wgmma swizzle it:
// the 16-byte units inside 128 bytes change places with the row.
LOWRANK_HD constexpr int swizzled(int row, int byte, int pitch) {
    int offset = row * pitch + byte;
    return offset ^ (((offset >> 7) & (pitch / 16 - 1)) << 4);
}

// Element `i` of the float32 accumulator that `thread` (of 128) holds of a wgmma result of 64 rows.
LOWRANK_HD constexpr int accumulator_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8;
}
LOWRANK_HD constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

// The same element's byte in a tile of 16-bit elements whose rows have `pitch` bytes, its column being `first` units of
// 8 columns further on; beyond the tile's width it is the next tile, `tile_bytes` away. Written so that the compiler
// sees which parts do not depend on the thread; equal to `swizzled` of the row and the column (the tests check it).
LOWRANK_HD constexpr int accumulator_offset(int thread, int i, int first, int pitch, int tile_bytes) {
    int const units = pitch / 16, unit = i / 4 + first;
    int const row = accumulator_row(thread, i), turn = thread % 32 / 4 / (128 / pitch) & (units - 1);
    return unit / units * tile_bytes + row * pitch + ((unit % units ^ turn) << 4) + thread % 4 * 4;
}

// The shape of a Hopper kernel that the compiler must know: rows of a row tile and the part of the rank that one CTA
// makes of the intermediate H = x down^T. The cluster's size is a run-time number; the rank it holds is Rank * columns.
template <int Rows_, int Rank_>
struct Tile {
    static constexpr int Rows = Rows_, Rank = Rank_;
    // Two consumer warpgroups split the rows (128) or the columns (64).
    static constexpr bool split_columns = Rows == 64;
    static constexpr int hidden_width = split_columns ? Rank / 2 : Rank;       // columns of H of one warpgroup
    static constexpr int out_width = split_columns ? kColumns / 2 : kColumns;  // columns of y of one warpgroup
    static_assert(Rows == 64 || Rows == 128, "64 or 128 rows");
    static_assert(hidden_width % 16 == 0 && hidden_width <= 256, "one wgmma is at most 256 wide");

    // A stage of the ring holds, in the first product, 64 columns of x and of down; in the second, part of up.
    static constexpr int x_bytes = Rows * kRowBytes;
    static constexpr int down_bytes = Rank * kRowBytes;
    static constexpr int up_rank = x_bytes + down_bytes >= 2 * kColumns * kRowBytes && Rank >= 128 ? 128 : 64;
    static constexpr int up_bytes = kColumns * kRowBytes * (up_rank / kDepth);
    static constexpr int stage_bytes = larger(x_bytes + down_bytes, up_bytes);
    static constexpr int stages = smaller(kMaxStages, 144 * 1024 / stage_bytes);

    // The first row and the first of `width` columns of a consumer warpgroup.
    LOWRANK_HD static constexpr int row_of(int group) { return split_columns ? 0 : group * 64; }
    LOWRANK_HD static constexpr int column_of(int group, int width) { return split_columns ? group * width : 0; }

    // H lies in chunks of hidden_chunk columns, each of them Rows rows of hidden_pitch bytes.
    static constexpr int hidden_chunk = smaller(kDepth, Rank);
    static constexpr int hidden_pitch = hidden_chunk * 2;
    static constexpr int slice_bytes = Rows * Rank * 2;
    // y leaves through one buffer of 64 x 64 for each warpgroup.
    static constexpr int staging_bytes = 64 * kRowBytes;

    // Shared memory: barriers, ring, H, staging. The ring starts on 1024 bytes, the period of the swizzle.
    static constexpr int ring_at = 1024;
    static constexpr int hidden_at = ring_at + stages * stage_bytes;
    LOWRANK_HD static constexpr int staging_at(int columns) { return hidden_at + columns * slice_bytes; }
    LOWRANK_HD static constexpr int shared_bytes(int columns) {
        return staging_at(columns) + kConsumers * staging_bytes + 1024;  // 1024 to align the start
    }
    LOWRANK_HD static constexpr int hidden_offset(int row, int column) {
        return column / hidden_chunk * Rows * hidden_pitch + swizzled(row, column % hidden_chunk * 2, hidden_pitch);
    }
};

// The run-time numbers of one launch of a linear; the same struct goes to the kernel and to the tests.
struct Plan {
    int rows, inner, outer;  // x (rows, inner), y (rows, outer)
    int rank;                // columns of H that are not padding
    int cluster;             // CTAs of a cluster
    int columns;             // CTAs that share a row tile: cluster, or 1 where the cluster shares the weights instead
    int clusters;            // clusters launched
    int groups;              // row tiles, in groups of cluster / columns
    int depth_steps;         // steps of 64 through the inner dimension
    int units;               // steps of up_rank through the rank
    int rounds;              // tiles of y that every CTA makes in a row tile; some may lie outside y
    // Base-2 logarithms of the CTAs that share the rows, and of those that share the weights: one of the two is 0. The
    // producer asks for them at every step, and a division takes a GPU as long as the rest of a step.
    int columns_log, row_tiles_log;

    LOWRANK_HD int row_tiles() const { return 1 << row_tiles_log; }
    LOWRANK_HD int slice(int rank) const { return columns == 1 ? 0 : rank; }
    LOWRANK_HD int first_row(int group, int rank, int tile_rows) const {
        return (group * row_tiles() + (columns == 1 ? rank : 0)) * tile_rows;
    }
    LOWRANK_HD int first_column(int round, int rank) const { return (round * columns + slice(rank)) * kColumns; }
};

template <class T>
LOWRANK_HD Plan make_plan(int rows, int inner, int outer, int rank, int cluster, int columns, int max_clusters) {
    Plan p{};
    p.rows = rows, p.inner = inner, p.outer = outer, p.rank = rank;
    p.cluster = cluster, p.columns = columns;
    p.groups = ceil_div(ceil_div(rows, T::Rows), cluster / columns);
    p.clusters = smaller(p.groups, larger(max_clusters, 1));
    p.depth_steps = ceil_div(inner, kDepth);
    p.units = ceil_div(T::Rank * columns, T::up_rank);
    p.rounds = ceil_div(ceil_div(outer, kColumns), columns);
    p.columns_log = log2_of(columns), p.row_tiles_log = log2_of(cluster / columns);
    return p;
}

// The rank unit that a CTA takes at step i of the second product: its own slice first, then round the cluster, so that
// nobody waits for a neighbour before it has to.
template <class T>
LOWRANK_HD int unit_at(Plan const& p, int rank, int i) {
    int unit = p.slice(rank) * T::Rank / T::up_rank + i;
    return unit < p.units ? unit : unit - p.units;
}
// The slices [first, last] of H that a unit reads.
template <class T>
LOWRANK_HD int first_slice(int unit) {
    return unit * T::up_rank / T::Rank;
}
template <class T>
LOWRANK_HD int last_slice(Plan const& p, int unit) {
    return smaller(((unit + 1) * T::up_rank - 1) / T::Rank, p.columns - 1);
}

// A position in the ring of stages: which one, and the parity of the phase in which it will be filled.
template <int Stages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    LOWRANK_HD void advance() {
        if (++stage == Stages) stage = 0, parity ^= 1;
    }
};

// Barriers, as indices of 8 bytes from the start of shared memory.
// full[stage]:  the producer's expectation, plus the bytes that TMA brings (from every CTA that multicasts to this one).
// empty[stage]: one arrival of each consumer warpgroup of each CTA of the cluster: all of them have read the stage, so
//               every CTA may write into it anywhere in the cluster.
// slice[s]:     slice s of H has come from its CTA (an expectation by this CTA, plus the bytes of the copy).
// hidden_free:  one arrival of each consumer warpgroup of each CTA that shares the row tile: H may be written again.
constexpr int kFull = 0, kEmpty = kMaxStages, kSlice = 2 * kMaxStages, kHiddenFree = kSlice + kMaxCluster;
constexpr int kPartsReady = kHiddenFree + 1, kPartsFull = kHiddenFree + 2, kRingFree = kHiddenFree + 3;
constexpr int kBarriers = kRingFree + 1;
static_assert(kBarriers * 8 <= kBarrierBytes, "the barriers fit their place");

// How many arrivals complete a phase of a barrier.
LOWRANK_HD constexpr int arrivals(int barrier, int cluster, int columns) {
    if (barrier < kEmpty) return 1;
    if (barrier < kSlice) return kConsumers * cluster;
    if (barrier < kHiddenFree) return 1;
    return kConsumers * columns;
}

// A pass through `steps` stages by a consumer: wait, multiply, and give back each stage one step later, when the product
// that reads it is surely done while the next one runs.
template <int Stages, class Machine, class Multiply>
LOWRANK_HD void consume_stages(Machine& m, Ring<Stages>& ring, int steps, Multiply multiply) {
    int previous = 0;
    for (int i = 0; i < steps; ++i) {
        m.wait_full(ring.stage, ring.parity);
        multiply(i, ring.stage);
        if (i > 0) {
            m.template drain<1>();
            m.release(previous);
        }
        previous = ring.stage;
        ring.advance();
    }
    m.template drain<0>();
    m.release(previous);
}

// ---- the linear: y = act((x down^T) up^T + bias) ----

// What a box of TMA is cut from.
enum Operand { kX, kDown, kUp, kUp1, kDown2 };

// Brings 64 columns from `column` of `rows` rows from `row` to `offset` in a stage, in boxes of at most 256 rows. With
// several parts (2 to the power of `parts_log`) each CTA of the cluster loads its part of the rows, for all of them.
template <Operand From, class Machine>
LOWRANK_HD void bring(Machine& m, int stage, int offset, int column, int row, int rows, int parts_log, int rank) {
    int const mine = rows >> parts_log, first = parts_log == 0 ? 0 : rank * mine;
    if (rows <= 256) return m.template box<From>(stage, offset + first * kRowBytes, column, row + first, mine, 1 << parts_log);
    int const height = smaller(mine, 256);
#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (int done = first; done < first + mine; done += height)
        m.template box<From>(stage, offset + done * kRowBytes, column, row + done, height, 1 << parts_log);
}

// The first product's loads: x goes to all CTAs that share the rows (each loads a part), down to all that share weights.
template <class T, class Machine>
LOWRANK_HD void produce_hidden(Plan const& p, int group, int rank, Machine& m, Ring<T::stages>& ring) {
    int const row = p.first_row(group, rank, T::Rows);
    for (int k = 0; k < p.depth_steps; ++k) {
        m.wait_empty(ring.stage, ring.parity ^ 1);
        m.expect(ring.stage, T::x_bytes + T::down_bytes);
        bring<kX>(m, ring.stage, 0, k * kDepth, row, T::Rows, p.columns_log, rank);
        bring<kDown>(m, ring.stage, T::x_bytes, k * kDepth, p.slice(rank) * T::Rank, T::Rank, p.row_tiles_log, rank);
        ring.advance();
    }
}

template <class T, class Machine>
LOWRANK_HD void produce_out(Plan const& p, int rank, Machine& m, Ring<T::stages>& ring) {
    for (int round = 0; round < p.rounds; ++round) {
        for (int i = 0; i < p.units; ++i) {
            m.wait_empty(ring.stage, ring.parity ^ 1);
            m.expect(ring.stage, T::up_bytes);
            int const unit = unit_at<T>(p, rank, i);
            for (int done = 0; done < T::up_rank; done += kDepth)
                bring<kUp>(m, ring.stage, done / kDepth * kColumns * kRowBytes, unit * T::up_rank + done,
                           p.first_column(round, rank), kColumns, p.row_tiles_log, rank);
            ring.advance();
        }
    }
}

// H: made, rounded, and gathered. `tile` counts the row tiles that this CTA has done. The barrier before the write
// keeps a warpgroup from writing what the other still reads; the one after it makes the slice whole.
template <class T, class Machine>
LOWRANK_HD void consume_hidden(Plan const& p, int row, int rank, int tile, Machine& m, Ring<T::stages>& ring) {
    m.expect_slices(p.slice(rank));
    m.clear_hidden();
    consume_stages(m, ring, p.depth_steps, [&](int k, int stage) { m.multiply_down(stage, k); });
    if (tile > 0) m.wait_hidden_free((tile - 1) & 1);
    m.join_before_write();
    m.write_hidden(p.slice(rank));
    m.join_after_write();
    m.send_hidden(p.slice(rank), row, 0);
}

template <class T, class Machine>
LOWRANK_HD void consume_out(Plan const& p, int row, int rank, uint32_t slices_parity, Machine& m,
                            Ring<T::stages>& ring) {
    for (int round = 0; round < p.rounds; ++round) {
        m.clear_out();
        m.load_out_bias(p.first_column(round, rank));
        consume_stages(m, ring, p.units, [&](int i, int stage) {
            int const unit = unit_at<T>(p, rank, i);
            if (round == 0)
                for (int s = first_slice<T>(unit); s <= last_slice<T>(p, unit); ++s)
                    if (s != p.slice(rank)) m.wait_slice(s, slices_parity);
            m.multiply_up(stage, unit);
        });
        m.store(row, p.first_column(round, rank));
    }
}

template <class T, class Machine>
LOWRANK_HD void produce(Plan const& p, int cluster, int rank, Machine& m) {
    Ring<T::stages> ring;
    for (int group = cluster; group < p.groups; group += p.clusters) {
        produce_hidden<T>(p, group, rank, m, ring);
        produce_out<T>(p, rank, m, ring);
    }
}

template <class T, class Machine>
LOWRANK_HD void consume(Plan const& p, int cluster, int rank, Machine& m) {
    Ring<T::stages> ring;
    int tile = 0;
    for (int group = cluster; group < p.groups; group += p.clusters, ++tile) {
        int const row = p.first_row(group, rank, T::Rows);
        consume_hidden<T>(p, row, rank, tile, m, ring);
        consume_out<T>(p, row, rank, tile & 1, m, ring);
        m.free_hidden();
    }
}

}  // namespace lowrank
