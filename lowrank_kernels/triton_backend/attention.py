"""``attention`` of rows within their sentences, by heads of any size: scores and values may differ in theirs.

Library kernels want both of one size and pad small heads to 32 or 64 numbers; heads that were decomposed have 8 and 24,
say, and no library kernel takes them without padding. A program holds a block of queries of one head and goes through
its sentence's keys with the running maximum and sum of FlashAttention (Dao et al., 2022), so scores are never stored.
Queries, keys and values may be views of one wider matrix.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from . import blocks, launch
from .tiles import FEW_QUERIES, Tile, attention_space

# Sizes and strides are handed over in units of so many numbers, where they are multiples of it: 16 bytes of 16 bits.
UNIT = 8
_LOG2_E = 1.4426950408889634


# fmt: off
@triton.jit(do_not_specialize=["PER_SENTENCE"])
def attention_kernel(
    q, k, v, asking, bounds, y,
    PER_SENTENCE,
    H, D, E, stride_q, stride_k, stride_v, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    # Triton knows of multiples of 16 alone; heads of 40 would be loaded number by number.
    D *= UNIT
    E *= UNIT
    stride_q *= UNIT
    stride_k *= UNIT
    stride_v *= UNIT
    # Blocks of one sentence and head are neighbours: they read the same keys.
    block = tl.program_id(0) % PER_SENTENCE
    head = tl.program_id(0) // PER_SENTENCE % H
    sentence = tl.program_id(0) // PER_SENTENCE // H
    begin = tl.load(asking + sentence).to(tl.int64)
    queries = (tl.load(asking + sentence + 1) - begin).to(tl.int32)
    first = block * BM
    if first >= queries:
        return
    key_begin = tl.load(bounds + sentence).to(tl.int64)
    keys = (tl.load(bounds + sentence + 1) - key_begin).to(tl.int32)
    m, n, d, e = first + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    asks, of_score, of_value = m < queries, d < D, e < E
    query = tl.load(
        q + (begin + m)[:, None] * stride_q + (head * D + d)[None, :],
        mask=asks[:, None] & of_score[None, :], other=0.0,
    )
    k_at = k + (key_begin + n)[None, :] * stride_k + (head * D + d)[:, None]
    v_at = v + (key_begin + n)[:, None] * stride_v + (head * E + e)[None, :]
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    context = tl.zeros((BM, BE), tl.float32)
    for at in range(0, keys, BN):
        inside = n < keys - at
        key = tl.load(k_at, mask=inside[None, :] & of_score[:, None], other=0.0)
        value = tl.load(v_at, mask=inside[:, None] & of_value[None, :], other=0.0)
        score = blocks.dot(query, key, tl.zeros((BM, BN), tl.float32), PRECISION, UPCAST) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - largest[:, None])
        shrunk = tl.exp2(before - largest)
        total = total * shrunk + tl.sum(weight, 1)
        context = blocks.dot(
            blocks.cast(weight, v, UPCAST), value, context * shrunk[:, None], PRECISION, UPCAST
        )
        k_at += BN * stride_k
        v_at += BN * stride_v
    tl.store(
        y + (begin + m)[:, None] * (H * E) + (head * E + e)[None, :],
        blocks.cast(context / total[:, None], y, UPCAST),
        mask=asks[:, None] & of_value[None, :],
    )
# fmt: on


class AttentionPlan:
    """``attention`` by a number of heads, as ``lowrank_kernels.reference.attention`` defines it."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asking: Tensor,
        bounds: Tensor,
        most_asking: int,
        longest: int,
        tile: Tile | None = None,
    ) -> tuple[Tensor, None, None]:
        query, key, value = (launch.rows_of(x) for x in (query, key, value))
        heads = self.heads
        of_score, of_value = query.shape[1] // heads, value.shape[1] // heads
        y = query.new_empty(len(query), heads * of_value)
        # Tiles are measured where every token asks.
        if tile is None or most_asking <= FEW_QUERIES:
            tile = attention_space(most_asking, max(of_score, of_value))[0]
        sizes = (of_score, of_value, query.stride(0), key.stride(0), value.stride(0))
        unit = gcd(UNIT, *sizes)
        per_sentence = -(-most_asking // tile.block_m)
        programs = per_sentence * heads * (len(asking) - 1)
        if programs and y.numel():
            launch.launch(
                attention_kernel,
                programs,
                tile,
                (query, key, value, asking, bounds, y),
                (per_sentence,),
                (heads, *(size // unit for size in sizes), of_score**-0.5 * _LOG2_E),
                (
                    *(tile.block_m, tile.block_n, _width(of_score), _width(of_value), unit),
                    *(launch.precision(query), launch.upcast(query)),
                ),
            )
        return y, None, None


def _width(size: int) -> int:
    """What holds a head's numbers in a product: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))
