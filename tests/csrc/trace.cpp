// Writes what every warp of a launch does, as the kernels' own programs decide it: one line an event, for test_cuda_schedule.
//   trace linear ROWS RANK  M K N R CLUSTER COLUMNS CLUSTERS
//   trace ffn RANK COLUMNS  M K F N R1 R2 CLUSTERS
//   trace ampere RANK  M K N R SPLITS
//   trace tiles | index
//   trace choice  M K N R PROCESSORS ROWS CLUSTER WEIGHTS NEURONS
//   trace predict  M K N R NEURONS ROWS RANK CLUSTER WEIGHTS CTAS
// and for the emulator the parameter block of a launch, as the host fills it, with what its maps describe:
//   trace block linear ROWS RANK  M K N R CLUSTER COLUMNS CLUSTERS  DTYPE ACTIVATION BIAS HIDDEN
//   trace block ffn RANK COLUMNS  M K F N R1 R2 CLUSTERS  DTYPE ACTIVATION BIAS HIDDEN
//   trace block ampere RANK  M K N R SPLITS  DTYPE ACTIVATION BIAS HIDDEN
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "arguments.h"
#include "choice.h"

using namespace lowrank;

struct Loads {
    void wait_empty(int stage, uint32_t parity) { std::printf("wait %d %u\n", kEmpty + stage, parity); }
    void expect(int stage, int bytes) { std::printf("expect %d %d\n", kFull + stage, bytes); }
    void wait_ring_free(uint32_t parity) { std::printf("wait %d %u\n", kRingFree, parity); }
    template <Operand From>
    void box(int stage, int offset, int column, int row, int height, int parts) {
        std::printf("load %d %d %d %d %d %d %d\n", int(From), stage, offset, column, row, height, parts);
    }
};

template <class T>
struct Work {
    Plan const& p;
    int group;

    void arrive(int barrier, int ctas) { std::printf("arrive %d %d\n", barrier, ctas); }
    void wait_full(int stage, uint32_t parity) { std::printf("wait %d %u\n", kFull + stage, parity); }
    void release(int stage) { arrive(kEmpty + stage, p.cluster); }
    template <int N>
    void drain() {
        std::printf("drain %d\n", N);
    }
    void clear_hidden() { std::printf("clear hidden\n"); }
    void clear_out() { std::printf("clear out\n"); }
    void load_out_bias(int) {}
    void multiply_down(int stage, int k) {
        std::printf("multiply_down %d %d %d %d\n", stage, k, T::row_of(group),
                    T::column_of(group, T::hidden_width));
    }
    void multiply_up(int stage, int unit) {
        std::printf("multiply_up %d %d %d %d %d\n", stage, unit, first_slice<T>(unit), last_slice<T>(p, unit),
                    T::column_of(group, T::out_width));
    }
    void expect_slices(int mine) {
        if (group == 0)
            for (int s = 0; s < p.columns; ++s)
                if (s != mine) std::printf("expect %d %d\n", kSlice + s, T::slice_bytes);
    }
    void wait_slice(int slice, uint32_t parity) { std::printf("wait %d %u\n", kSlice + slice, parity); }
    void wait_hidden_free(uint32_t parity) { std::printf("wait %d %u\n", kHiddenFree, parity); }
    void free_hidden() { arrive(kHiddenFree, p.columns); }
    void join_before_write() { std::printf("meet\n"); }
    void join_after_write() { std::printf("meet\n"); }
    void write_hidden(int slice) { std::printf("write %d 0\n", slice); }
    void send_hidden(int slice, int row, int which) {
        if (group == 0) std::printf("send %d %d %d\n", slice, row, which);
    }
    void store(int row, int column) {
        std::printf("store %d %d %d\n", row + T::row_of(group), column + T::column_of(group, T::out_width), T::out_width);
    }
    // The feed-forward's.
    void clear_parts() { std::printf("clear parts\n"); }
    void multiply_up1(int stage) { std::printf("multiply_up1 %d\n", stage); }
    void load_bias(int) {}
    void activate_neurons() { std::printf("activate\n"); }
    void round_neurons(int first) { std::printf("round %d\n", first); }
    void multiply_down2(int stage) { std::printf("multiply_down2 %d\n", stage); }
    void arrive_parts_ready() { arrive(kPartsReady, p.columns); }
    void wait_parts_ready(uint32_t parity) { std::printf("wait %d %u\n", kPartsReady, parity); }
    void send_parts() { std::printf("send_parts\n"); }
    void arrive_parts_full() { arrive(kPartsFull, p.columns); }
    void wait_parts_full(uint32_t parity) { std::printf("wait %d %u\n", kPartsFull, parity); }
    void add_parts(int slice) { std::printf("add_parts %d\n", slice); }
    void free_ring() {
        std::printf("parts_read\n");
        arrive(kRingFree, p.columns);
    }
    void keep_parts() { std::printf("keep_parts\n"); }
    void write_q(int slice) { std::printf("write %d 1\n", slice); }
};

struct AmpereWork {
    bool hidden = true;
    void load_hidden(int stage, int k, int row) { std::printf("load %d hidden %d %d\n", stage, k, row); }
    void load_up(int stage, int chunk, int column) { std::printf("load %d up %d %d\n", stage, chunk, column); }
    void commit() { std::printf("commit\n"); }
    void wait_oldest() { std::printf("wait %d\n", AmpereTile<128>::Stages - 2); }
    void wait_all() { std::printf("wait 0\n"); }
    void meet() { std::printf("meet\n"); }
    void clear_hidden() { std::printf("clear\n"); }
    void clear_out() { std::printf("clear\n"); }
    void multiply_down(int stage, int k) { std::printf("use %d hidden %d\n", stage, k); }
    void multiply_up(int stage, int chunk) { std::printf("use %d up %d\n", stage, chunk); }
    void write_hidden(int row, bool store) { std::printf("write %d %d\n", row, int(store)); }
    void store(int row, int column) { std::printf("store %d %d\n", row, column); }
    bool stores_hidden() const { return hidden; }
};

template <class T>
void header(Plan const& p) {
    std::printf("plan %d %d %d %d %d %d %d %d %d %d %d %d\n", T::Rows, T::Rank, T::up_rank, T::stages, T::stage_bytes,
                p.cluster, p.columns, p.clusters, p.groups, p.depth_steps, p.units, int(T::split_columns));
    for (int b = 0; b < kBarriers; ++b) std::printf("barrier %d %d\n", b, arrivals(b, p.cluster, p.columns));
}

template <class T, class P, class Produce, class Consume>
void every_role(P const& p, Produce produce_role, Consume consume_role) {
    header<T>(p);
    for (int cluster = 0; cluster < p.clusters; ++cluster)
        for (int rank = 0; rank < p.cluster; ++rank) {
            std::printf("role %d %d 0\n", cluster, rank);
            Loads loads;
            produce_role(cluster, rank, loads);
            for (int group = 0; group < kConsumers; ++group) {
                std::printf("role %d %d %d\n", cluster, rank, group + 1);
                Work<T> work{p, group};
                consume_role(cluster, rank, work);
            }
        }
}

template <class T>
void linear(int const* a) {
    Plan const p = make_plan<T>(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    every_role<T>(p, [&](int c, int r, auto& m) { produce<T>(p, c, r, m); },
                  [&](int c, int r, auto& m) { consume<T>(p, c, r, m); });
}

template <class T>
void ffn(int const* a) {
    FfnPlan const p = make_ffn_plan<T>(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    std::printf("neurons %d %d\n", p.neuron_steps, T::held);
    every_role<T>(p, [&](int c, int r, auto& m) { produce_ffn<T>(p, c, r, m); },
                  [&](int c, int r, auto& m) { consume_ffn<T>(p, c, r, m); });
}

template <class T>
void ampere(int const* a) {
    AmperePlan const p = make_ampere_plan<T>(a[0], a[1], a[2], a[3], a[4]);
    for (int cta = 0; cta < p.ctas; ++cta) {
        std::printf("role %d %d %d\n", cta, cta / p.splits, cta % p.splits);
        AmpereWork work;
        ampere_run<T>(p, cta, work);
    }
}

// Every accumulator element of a warpgroup: its row, its column, and where it is put.
void index() {
    for (int pitch : {64, 128})
        for (int first : {0, 2, 4})
            for (int thread = 0; thread < 128; ++thread)
                for (int i = 0; i < 32; ++i) {
                    int const column = accumulator_column(thread, i) + first * 8, width = pitch / 2, tile = 64 * pitch;
                    std::printf("%d %d %d %d %d %d\n", pitch, first, accumulator_row(thread, i), column,
                                accumulator_offset(thread, i, first, pitch, tile) + (i & 1) * 2,
                                column / width * tile + swizzled(accumulator_row(thread, i), column % width * 2, pitch));
                }
}

// A tensor map as the emulator needs it, of the size of CUtensorMap.
struct alignas(128) BoxMap {
    Matrix matrix;
    int width, height;
};

// Every matrix has an address of its own, and rows that are longer than their columns by 8 elements of nothing.
Matrix matrix(char const* name, int64_t rows, int64_t columns) {
    static int64_t number = 0;
    Matrix const m{reinterpret_cast<void*>(++number << 40), rows, columns, columns + 8};
    std::printf("matrix %s %lld %lld %lld %lld\n", name, (long long)(number << 40), (long long)rows, (long long)columns,
                (long long)m.stride);
    return m;
}

void print_block(void const* block, size_t size, BoxMap const* maps, int count) {
    for (int i = 0; i < count; ++i)
        std::printf("map %zu %lld %d %d\n", i * sizeof(BoxMap), (long long)maps[i].matrix.data, maps[i].width, maps[i].height);
    std::printf("block ");
    for (size_t i = 0; i < size; ++i) std::printf("%02x", static_cast<unsigned char const*>(block)[i]);
    std::printf("\n");
}

int padded(int rank) { return ceil_div(rank, 16) * 16; }
BoxMap box_map(Matrix const& m, int width, int height) { return {m, width, height}; }

Linear linear_call(int rows, int inner, int outer, int rank, int const* options) {
    Linear c;
    c.x = matrix("x", rows, inner), c.down = matrix("down", padded(rank), inner);
    c.up = matrix("up", outer, padded(rank)), c.y = matrix("y", rows, outer);
    if (options[2]) c.bias = matrix("bias", 1, outer).data;
    if (options[3]) c.hidden = matrix("hidden", rows, padded(rank));
    c.rank = rank, c.dtype = options[0], c.activation = options[1];
    return c;
}

template <class T>
void linear_block(int const* a) {
    Linear const call = linear_call(a[0], a[1], a[2], a[3], a + 7);
    auto const block = linear_arguments<T, BoxMap>(call, a[4], a[5], a[6], box_map);
    std::printf("launch %d %d %d %d\n", block.plan.clusters, a[4], kThreads, T::shared_bytes(a[5]));
    print_block(&block, sizeof block, &block.x, 5);
}

template <class T>
void ffn_block(int const* a) {
    int const *options = a + 7, rank1 = a[4], rank2 = a[5];
    Ffn c;
    c.x = matrix("x", a[0], a[1]), c.down1 = matrix("down1", padded(rank1), a[1]);
    c.up1 = matrix("up1", a[2], padded(rank1)), c.down2 = matrix("down2", padded(rank2), a[2]);
    c.up2 = matrix("up2", a[3], padded(rank2)), c.y = matrix("y", a[0], a[3]);
    if (options[2]) c.bias1 = matrix("bias1", 1, a[2]).data, c.bias2 = matrix("bias2", 1, a[3]).data;
    if (options[3]) c.p = matrix("p", a[0], padded(rank1)), c.q = matrix("q", a[0], padded(rank2));
    c.rank1 = rank1, c.rank2 = rank2, c.dtype = options[0], c.activation = options[1];
    auto const block = ffn_arguments<T, BoxMap>(c, a[6], box_map);
    std::printf("launch %d %d %d %d\n", block.plan.clusters, T::Columns, kThreads, T::shared_bytes(T::Columns));
    print_block(&block, sizeof block, &block.x, 8);
}

template <class T>
void ampere_block(int const* a) {
    AmpereArguments const block = ampere_arguments<T>(linear_call(a[0], a[1], a[2], a[3], a + 5), a[4]);
    std::printf("launch %d 1 %d %d\n", block.plan.ctas, kAmpereThreads, T::shared_bytes);
    print_block(&block, sizeof block, nullptr, 0);
}

int print_blocks(char const* kind, int const* a) {
    if (!std::strcmp(kind, "linear")) {
#define TILE(r, k) if (a[0] == r && a[1] == k) return linear_block<Tile<r, k>>(a + 2), 0;
        LOWRANK_LINEAR_TILES(TILE)
#undef TILE
    } else if (!std::strcmp(kind, "ffn")) {
#define TILE(k, c) if (a[0] == k && a[1] == c) return ffn_block<FfnTile<k, c>>(a + 2), 0;
        LOWRANK_FFN_TILES(TILE)
#undef TILE
    } else if (!std::strcmp(kind, "ampere")) {
        return (a[0] == 128 ? ampere_block<AmpereTile<128>>(a + 1) : ampere_block<AmpereTile<256>>(a + 1)), 0;
    }
    return 2;
}

int main(int argc, char** argv) {
    int a[16] = {};
    if (argc > 2 && !std::strcmp(argv[1], "block")) {
        for (int i = 3; i < argc && i < 19; ++i) a[i - 3] = std::atoi(argv[i]);
        return print_blocks(argv[2], a);
    }
    for (int i = 2; i < argc && i < 18; ++i) a[i - 2] = std::atoi(argv[i]);
    if (!std::strcmp(argv[1], "linear")) {
#define TILE(r, k) if (a[0] == r && a[1] == k) return linear<Tile<r, k>>(a + 2), 0;
        LOWRANK_LINEAR_TILES(TILE)
#undef TILE
    } else if (!std::strcmp(argv[1], "ffn")) {
#define TILE(k, c) if (a[0] == k && a[1] == c) return ffn<FfnTile<k, c>>(a + 2), 0;
        LOWRANK_FFN_TILES(TILE)
#undef TILE
    } else if (!std::strcmp(argv[1], "ampere")) {
        return (a[0] == 128 ? ampere<AmpereTile<128>>(a + 1) : ampere<AmpereTile<256>>(a + 1)), 0;
    } else if (!std::strcmp(argv[1], "index")) {
        return index(), 0;
    } else if (!std::strcmp(argv[1], "tiles")) {
        for (int columns : {1, 2, 4, 8}) {
#define TILE(r, k) \
    if (r * k * columns <= 128 * 256) std::printf("linear %d %d %d %d\n", r, k, columns, Tile<r, k>::shared_bytes(columns));
            LOWRANK_LINEAR_TILES(TILE)
#undef TILE
        }
#define TILE(k, c) std::printf("ffn %d %d %d\n", k, c, FfnTile<k, c>::shared_bytes(c));
        LOWRANK_FFN_TILES(TILE)
#undef TILE
        std::printf("ampere 128 %d\nampere 256 %d\n", AmpereTile<128>::shared_bytes, AmpereTile<256>::shared_bytes);
        return 0;
    } else if (!std::strcmp(argv[1], "choice")) {
        Problem p{a[0], a[1], a[2], a[3]};
        Gpu const gpu = typical_gpu(a[4]);
        Choice const c = choose_linear(p, gpu, a[5], a[6], a[7]);
        p.neurons = larger(a[8], 1);
        Choice const f = choose_ffn(p, gpu, a[6]);
        std::printf("%d %d %d %d\n%d %d\n", c.rows, c.rank, c.cluster, c.weights, f.rank, f.cluster);
        if (f.rows != 0) std::printf("%d %.3f\n", ceil_div(f.groups(p), gpu.fit[f.cluster]), predicted_us(p, f, gpu));
        p.neurons = 0;
        if (c.rows != 0) std::printf("%d %.3f\n", ceil_div(c.groups(p), gpu.fit[c.cluster]), predicted_us(p, c, gpu));
        return 0;
    } else if (!std::strcmp(argv[1], "predict")) {
        Problem const p{a[0], a[1], a[2], a[3], a[4]};
        Choice const c{a[5], a[6], a[7], a[8]};
        std::printf("%.6f %.6f\n", kLaunch, predicted_round(p, c, a[9]));
        return 0;
    }
    return 2;
}
