// The feed-forward's programs: the linear's, with the loop over neurons between its two halves.
//
// A cluster owns a row tile. Its CTAs gather p = x down1^T as the linear gathers H; each then takes its share of the
// neurons, 64 at a time, and adds act(p up1^T + bias1) down2^T to its own part of q; the parts are added through
// distributed shared memory, slice by slice and in the order of the CTAs; the rounded slices of q are gathered in p's
// place; and y = q up2^T + bias2 is the linear's second product.
//
// In the loop the product with up1 is a step ahead of the one with down2, and the activation is computed while the
// latter runs, as FlashAttention-3 orders its two products.
#pragma once
#include "schedule.h"

namespace lowrank {

constexpr int kNeurons = 64;  // neurons per step: a row of down2's tile

// Rank_ columns of p and q for each of Columns_ CTAs.
template <int Rank_, int Columns_>
struct FfnTile : Tile<128, Rank_> {
    using Base = Tile<128, Rank_>;
    static constexpr int Columns = Columns_, held = Rank_ * Columns_;
    static_assert(held == 128 || held == 256, "the part of q is one accumulator");
    // A stage also holds up1's rows of 64 neurons, or down2's columns of them: 64 by `held` either way.
    static constexpr int neuron_bytes = held * kRowBytes;
    static constexpr int stage_bytes = larger(Base::stage_bytes, neuron_bytes);
    static constexpr int stages = smaller(kMaxStages, 144 * 1024 / stage_bytes);
    static_assert(stages >= 3, "two of the loop's products hold a stage each, and one is loaded");
    static constexpr int hidden_at = Base::ring_at + stages * stage_bytes;
    LOWRANK_HD static constexpr int staging_at(int columns) { return hidden_at + columns * Base::slice_bytes; }
    LOWRANK_HD static constexpr int shared_bytes(int columns) {
        return staging_at(columns) + kConsumers * Base::staging_bytes + 1024;
    }
    // The parts of q that come from the CTAs lie where the ring was.
    static constexpr int part_bytes = Base::Rows * Rank_ * 4;
    static_assert(Columns * part_bytes <= stages * stage_bytes || Columns == 1, "the parts fit the ring");
};

// Where in a CTA's part (of `part_bytes`) consumer thread `thread` of 256 keeps elements i to i + 3 of its accumulator:
// threads side by side, so that neither the writer nor the reader meets a bank conflict.
LOWRANK_HD constexpr int part_offset(int thread, int i) { return (i / 4 * 128 * kConsumers + thread) * 16; }

struct FfnPlan : Plan {
    int neurons;
    int rank2;         // columns of q that are not padding; `rank` is p's
    int neuron_steps;  // of every CTA; some of its steps may lie beyond the last neuron

    LOWRANK_HD int first_neuron(int step, int rank) const { return (step * columns + slice(rank)) * kNeurons; }
};

template <class T>
LOWRANK_HD FfnPlan make_ffn_plan(int rows, int inner, int neurons, int outer, int rank1, int rank2, int max_clusters) {
    FfnPlan p{};
    static_cast<Plan&>(p) = make_plan<T>(rows, inner, outer, rank1, T::Columns, T::Columns, max_clusters);
    p.neurons = neurons, p.rank2 = rank2;
    p.neuron_steps = ceil_div(ceil_div(neurons, kNeurons), T::Columns);
    return p;
}

template <class T, class Machine>
LOWRANK_HD void produce_ffn(FfnPlan const& p, int cluster, int rank, Machine& m) {
    Ring<T::stages> ring;
    int tile = 0;
    for (int group = cluster; group < p.groups; group += p.clusters, ++tile) {
        produce_hidden<T>(p, group, rank, m, ring);
        for (int step = 0; step <= p.neuron_steps; ++step) {
            for (int side = 0; side < 2; ++side) {
                int const of = step - side;  // up1 a step ahead of down2
                if (of < 0 || of == p.neuron_steps) continue;
                m.wait_empty(ring.stage, ring.parity ^ 1);
                m.expect(ring.stage, T::neuron_bytes);
                int const neuron = p.first_neuron(of, rank);
                if (side == 0) {
                    for (int done = 0; done < T::held; done += kDepth)
                        bring<kUp1>(m, ring.stage, done * kNeurons * 2, done, neuron, kNeurons, 0, rank);
                } else {
                    bring<kDown2>(m, ring.stage, 0, neuron, 0, T::held, 0, rank);
                }
                ring.advance();
            }
        }
        // The ring's memory is lent to the parts of q until every CTA of the cluster has added its slice.
        if constexpr (T::Columns > 1) m.wait_ring_free(tile & 1);
        produce_out<T>(p, rank, m, ring);
    }
}

template <class T, class Machine>
LOWRANK_HD void consume_neurons(FfnPlan const& p, int rank, Machine& m, Ring<T::stages>& ring) {
    // No branch in the loop: the compiler keeps products asynchronous only where it sees which of them run.
    int up = ring.stage;
    m.load_bias(p.first_neuron(0, rank));
    m.wait_full(up, ring.parity);
    m.multiply_up1(up);
    ring.advance();
    m.template drain<0>();
    m.release(up);
    m.activate_neurons();
    m.round_neurons(p.first_neuron(0, rank));
    for (int step = 1; step < p.neuron_steps; ++step) {
        up = ring.stage;
        m.load_bias(p.first_neuron(step, rank));
        m.wait_full(up, ring.parity);
        m.multiply_up1(up);
        ring.advance();
        int const down = ring.stage;
        m.wait_full(down, ring.parity);
        m.multiply_down2(down);
        ring.advance();
        m.template drain<1>();
        m.release(up);
        m.activate_neurons();
        m.template drain<0>();
        m.release(down);
        m.round_neurons(p.first_neuron(step, rank));
    }
    m.wait_full(ring.stage, ring.parity);
    m.multiply_down2(ring.stage);
    m.template drain<0>();
    m.release(ring.stage);
    ring.advance();
}

template <class T, class Machine>
LOWRANK_HD void consume_ffn(FfnPlan const& p, int cluster, int rank, Machine& m) {
    Ring<T::stages> ring;
    int tile = 0;
    for (int group = cluster; group < p.groups; group += p.clusters, ++tile) {
        int const row = p.first_row(group, rank, T::Rows), mine = p.slice(rank);
        consume_hidden<T>(p, row, rank, tile, m, ring);
        for (int s = 0; s < p.columns; ++s)
            if (s != mine) m.wait_slice(s, 0);
        m.clear_parts();
        consume_neurons<T>(p, mine, m, ring);
        m.expect_slices(mine);
        if constexpr (T::Columns > 1) {
            // Nobody reads p or the ring any more, in any CTA; then everybody has its parts; then the ring is free again.
            m.arrive_parts_ready();
            m.wait_parts_ready(tile & 1);
            m.send_parts();
            m.arrive_parts_full();
            m.wait_parts_full(tile & 1);
            m.add_parts(mine);
            m.free_ring();
        } else {
            m.keep_parts();
        }
        m.join_before_write();
        m.write_q(mine);
        m.join_after_write();
        m.send_hidden(mine, row, 1);
        consume_out<T>(p, row, rank, 1, m, ring);
        m.free_hidden();
    }
}

}  // namespace lowrank
