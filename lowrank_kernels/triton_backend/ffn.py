"""``lowrank_ffn``: the whole low-rank feed-forward, without its wide intermediate.

This is FlashAttention's loop with the activation in place of the softmax: p = x down1^T is the query, up1 the keys,
down2 the values, the neurons the sequence. A program owns block_m rows and accumulates in registers
q = act(p up1^T + b1) down2^T over block_f neurons at a time, then expands y = q up2^T + b2.

With few rows the neurons are split between programs. Each writes its float32 part of q, and a second kernel adds the
parts in the order of the splits (so the sum is the same from run to run) and expands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, device, launch
from .tiles import Family, Tile, ffn_pieces


# fmt: off
@triton.jit(do_not_specialize=["M", "splits"])
def ffn_kernel(
    x, down1, up1, bias1, down2, up2, bias2, y, p, q, parts,
    M, splits,
    K, F, N, R1, R2, RP1, RP2, stride_x, stride_d1r, stride_d1k, stride_u1f, stride_u1r,
    stride_d2r, stride_d2f, stride_u2n, stride_u2r,
    BM: tl.constexpr, A1: tl.constexpr, B1: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr,
    BK: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % splits
    row = (program // splits).to(tl.int64) * BM + tl.arange(0, BM)
    pa, pb = blocks.project(
        x, down1, row, M, K, R1, RP1, stride_x, stride_d1r, stride_d1k, BM, A1, B1, BK, TRANSPOSED,
        PRECISION, UPCAST,
    )
    if p is not None:
        if part == 0:
            blocks.store_pieces(pa, pb, p, row, M, R1, R1, A1, B1)
    a = tl.arange(0, A2)
    qa = tl.zeros((BM, A2), tl.float32)
    if B2 > 0:
        b = A2 + tl.arange(0, B2)
        qb = tl.zeros((BM, B2), tl.float32)
    width = tl.cdiv(tl.cdiv(F, BF), splits) * BF
    for first in range(part * width, tl.minimum(part * width + width, F), BF):
        f = first + tl.arange(0, BF)
        z = blocks.expand_tile(
            pa, pb, up1, first, F, RP1, stride_u1f, stride_u1r, A1, B1, BM, BF, PRECISION, UPCAST
        )
        if bias1 is not None:
            z += tl.load(bias1 + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        # Neurons beyond F are NaN rather than 0 where the row holds Inf.
        neurons = tl.where((f < F)[None, :], blocks.activate(z, ACTIVATION), 0.0)
        neurons = blocks.cast(neurons, x, UPCAST)
        factor = tl.load(
            down2 + a[None, :] * stride_d2r + f[:, None] * stride_d2f,
            mask=(a < RP2)[None, :] & (f < F)[:, None],
            other=0.0,
        )
        qa = blocks.dot(neurons, factor, qa, PRECISION, UPCAST)
        if B2 > 0:
            factor = tl.load(
                down2 + b[None, :] * stride_d2r + f[:, None] * stride_d2f,
                mask=(b < RP2)[None, :] & (f < F)[:, None],
                other=0.0,
            )
            qb = blocks.dot(neurons, factor, qb, PRECISION, UPCAST)
    if parts is not None:
        at = parts + part.to(tl.int64) * M * R2
        if B2 > 0:
            blocks.store_pieces(qa, qb, at, row, M, R2, R2, A2, B2)
        else:
            blocks.store_pieces(qa, qa, at, row, M, R2, R2, A2, B2)
    else:
        qa = blocks.finish_piece(qa, x, 0, R2, A2, False, UPCAST)
        if B2 > 0:
            qb = blocks.finish_piece(qb, x, A2, R2, B2, False, UPCAST)
        else:
            qb = qa
        if q is not None:
            blocks.store_pieces(qa, qb, q, row, M, R2, R2, A2, B2)
        blocks.expand(
            qa, qb, up2, bias2, None, y, None, row, M, 0, N, N, RP2,
            stride_u2n, stride_u2r, 0, N, A2, B2, BM, BN, "none", PRECISION, UPCAST,
        )


@triton.jit
def _sum_parts(parts, row, inside, column, M, R2, splits, BM: tl.constexpr, W: tl.constexpr):
    total = tl.zeros((BM, W), tl.float32)
    at = parts + row[:, None] * R2 + column[None, :]
    for _ in range(0, splits):
        total += tl.load(at, mask=inside & (column < R2)[None, :], other=0.0)
        at += tl.cast(M, tl.int64) * R2
    return total


@triton.jit(do_not_specialize=["M", "splits", "column_splits"])
def ffn_reduce_kernel(
    y, parts, up2, bias2, q,
    M, splits, column_splits,
    N, R2, RP2, stride_u2n, stride_u2r,
    BM: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Add the parts of q in a fixed order, round, and expand a share of the columns of y."""
    program = tl.program_id(0)
    part = program % column_splits
    row = (program // column_splits).to(tl.int64) * BM + tl.arange(0, BM)
    inside = (row < M)[:, None]
    qa = _sum_parts(parts, row, inside, tl.arange(0, A2), M, R2, splits, BM, A2)
    qa = blocks.cast(qa, y, UPCAST)
    if B2 > 0:
        qb = _sum_parts(parts, row, inside, A2 + tl.arange(0, B2), M, R2, splits, BM, B2)
        qb = blocks.cast(qb, y, UPCAST)
    else:
        qb = qa
    if q is not None:
        if part == 0:
            blocks.store_pieces(qa, qb, q, row, M, R2, R2, A2, B2)
    width = tl.cdiv(tl.cdiv(N, BN), column_splits) * BN
    blocks.expand(
        qa, qb, up2, bias2, None, y, None, row, M,
        part * width, tl.minimum(part * width + width, N), N, RP2,
        stride_u2n, stride_u2r, 0, N, A2, B2, BM, BN, "none", PRECISION, UPCAST,
    )
# fmt: on


def transposed(tile: Tile, width: int, family: Family | None) -> bool:
    """Whether p goes through shared memory (see ``blocks.project``): on Hopper, if p and q overflow the registers."""
    return family is Family.HOPPER and tile.block_m * width >= 128 * 256


class FFNPlan:
    """``ffn`` with its factors in place: call it with what is left of the arguments."""

    def __init__(
        self,
        down1: Tensor,
        up1: Tensor,
        bias1: Tensor | None,
        down2: Tensor,
        up2: Tensor,
        bias2: Tensor | None,
        activation: str,
    ) -> None:
        (self.neurons, self.rank1), (self.outer, self.rank2) = up1.shape, up2.shape
        self.down1, self.up1, padded1 = launch.aligned(down1, up1)
        self.down2, self.up2, self.padded2 = launch.aligned(down2, up2)
        self.bias1, self.bias2 = launch.contiguous(bias1), launch.contiguous(bias2)
        self.activation = activation
        self.tiles: dict[int, Tile] = {}
        self.family = device.family(down1.device)
        self.pieces1 = ffn_pieces(self.rank1, self.family)
        self.pieces2 = ffn_pieces(self.rank2, self.family)
        self.numbers = (
            *(down1.shape[1], self.neurons, self.outer),
            *(self.rank1, self.rank2, padded1, self.padded2),
        )
        first = (*self.down1.stride(), *self.up1.stride())
        self.strides = (*first, *self.down2.stride(), *self.up2.stride())

    def __call__(
        self, x: Tensor, save_hidden: bool = False, tile: Tile | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = launch.rows_of(x)
        rows, outer = x.shape[0], self.outer
        y = x.new_empty(rows, outer)
        p = x.new_empty(rows, self.rank1) if save_hidden else None
        q = x.new_empty(rows, self.rank2) if save_hidden else None
        if rows == 0 or outer == 0:
            return y, p, q
        rank = max(self.rank1, self.rank2)
        tile = launch.resolve_tile("ffn", tile, x, rank, self.neurons, self.tiles)
        one, two = self.pieces1, self.pieces2
        products = (launch.precision(x), launch.upcast(x))
        row_blocks = -(-rows // tile.block_m)
        parts = None
        if tile.splits > 1:
            parts = x.new_empty(tile.splits, rows, self.rank2, dtype=torch.float32)
        factors = (self.down1, self.up1, self.bias1, self.down2, self.up2, self.bias2)
        launch.launch(
            ffn_kernel,
            row_blocks * tile.splits,
            tile,
            (x, *factors, y, p, q, parts),
            (rows, tile.splits),
            (*self.numbers, x.stride(0), *self.strides),
            (
                tile.block_m,
                *one,
                *two,
                tile.block_k,
                tile.block_f,
                tile.block_n,
                self.activation,
                transposed(tile, one[0], self.family),
                *products,
            ),
        )
        if parts is not None:
            column_splits = min(tile.splits, -(-outer // tile.block_n))
            launch.launch(
                ffn_reduce_kernel,
                row_blocks * column_splits,
                tile,
                (y, parts, self.up2, self.bias2, q),
                (rows, tile.splits, column_splits),
                (outer, self.rank2, self.padded2, *self.strides[6:]),
                (tile.block_m, *two, tile.block_n, *products),
            )
        return y, p, q


def ffn(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_hidden: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form of ``lowrank_ffn`` on x (rows, in); see ``lowrank_kernels.reference.ffn``."""
    plan = FFNPlan(down1, up1, bias1, down2, up2, bias2, activation)
    return plan(x, save_hidden, tile)
