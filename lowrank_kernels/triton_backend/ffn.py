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

from . import blocks, launch
from .device import has_wgmma
from .tiles import Tile, ffn_pieces


@triton.jit
def ffn_kernel(
    x,
    down1,
    up1,
    bias1,
    down2,
    up2,
    bias2,
    y,
    p,
    q,
    parts,
    M,
    K,
    F,
    N,
    R1,
    R2,
    RP1,
    RP2,
    stride_x,
    stride_d1r,
    stride_d1k,
    stride_u1f,
    stride_u1r,
    stride_d2r,
    stride_d2f,
    stride_u2n,
    stride_u2r,
    splits,
    BM: tl.constexpr,
    A1: tl.constexpr,
    B1: tl.constexpr,
    A2: tl.constexpr,
    B2: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % splits
    row = (program // splits).to(tl.int64) * BM + tl.arange(0, BM)
    pa, pb = blocks.project(
        x,
        down1,
        row,
        M,
        K,
        R1,
        RP1,
        stride_x,
        stride_d1r,
        stride_d1k,
        BM,
        A1,
        B1,
        BK,
        TRANSPOSED,
        PRECISION,
        UPCAST,
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
            qa,
            qb,
            up2,
            bias2,
            None,
            y,
            None,
            row,
            M,
            0,
            N,
            N,
            RP2,
            stride_u2n,
            stride_u2r,
            0,
            N,
            A2,
            B2,
            BM,
            BN,
            "none",
            PRECISION,
            UPCAST,
        )


@triton.jit
def _sum_parts(parts, row, inside, column, M, R2, splits, BM: tl.constexpr, W: tl.constexpr):
    total = tl.zeros((BM, W), tl.float32)
    at = parts + row[:, None] * R2 + column[None, :]
    for _ in range(0, splits):
        total += tl.load(at, mask=inside & (column < R2)[None, :], other=0.0)
        at += tl.cast(M, tl.int64) * R2
    return total


@triton.jit
def ffn_reduce_kernel(
    parts,
    up2,
    bias2,
    y,
    q,
    M,
    N,
    R2,
    RP2,
    stride_u2n,
    stride_u2r,
    splits,
    column_splits,
    BM: tl.constexpr,
    A2: tl.constexpr,
    B2: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
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
        qa,
        qb,
        up2,
        bias2,
        None,
        y,
        None,
        row,
        M,
        part * width,
        tl.minimum(part * width + width, N),
        N,
        RP2,
        stride_u2n,
        stride_u2r,
        0,
        N,
        A2,
        B2,
        BM,
        BN,
        "none",
        PRECISION,
        UPCAST,
    )


def transposed(tile: Tile, width: int, wgmma: bool) -> bool:
    """Whether p goes through shared memory (see ``blocks.project``): on Hopper, if p and q overflow the registers."""
    return wgmma and tile.block_m * width >= 128 * 256


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
    x = launch.rows_of(x)
    (rows, inner), (neurons, rank1), (outer, rank2) = x.shape, up1.shape, up2.shape
    down1, up1, padded1 = launch.aligned(down1, up1)
    down2, up2, padded2 = launch.aligned(down2, up2)
    y = x.new_empty(rows, outer)
    p = x.new_empty(rows, rank1) if save_hidden else None
    q = x.new_empty(rows, rank2) if save_hidden else None
    if rows == 0 or outer == 0:
        return y, p, q
    tile = launch.resolve_tile("ffn", tile, x, max(rank1, rank2), neurons)
    hopper = has_wgmma(x.device)
    (a1, b1), (a2, b2) = ffn_pieces(rank1, hopper), ffn_pieces(rank2, hopper)
    bias1 = None if bias1 is None else bias1.contiguous()
    bias2 = None if bias2 is None else bias2.contiguous()
    parts = None
    if tile.splits > 1:
        parts = torch.empty(tile.splits, rows, rank2, dtype=torch.float32, device=x.device)
    shared = {**launch.numeric_options(x), **launch.launch_options(tile)}
    blocks_of_rows = triton.cdiv(rows, tile.block_m)
    ffn_kernel[(blocks_of_rows * tile.splits,)](
        x,
        down1,
        up1,
        bias1,
        down2,
        up2,
        bias2,
        y,
        p,
        q,
        parts,
        rows,
        inner,
        neurons,
        outer,
        rank1,
        rank2,
        padded1,
        padded2,
        x.stride(0),
        *down1.stride(),
        *up1.stride(),
        *down2.stride(),
        *up2.stride(),
        tile.splits,
        BM=tile.block_m,
        A1=a1,
        B1=b1,
        A2=a2,
        B2=b2,
        BK=tile.block_k,
        BF=tile.block_f,
        BN=tile.block_n,
        ACTIVATION=activation,
        TRANSPOSED=transposed(tile, a1, hopper),
        **shared,
    )
    if parts is not None:
        column_splits = min(tile.splits, triton.cdiv(outer, tile.block_n))
        ffn_reduce_kernel[(blocks_of_rows * column_splits,)](
            parts,
            up2,
            bias2,
            y,
            q,
            rows,
            outer,
            rank2,
            padded2,
            *up2.stride(),
            tile.splits,
            column_splits,
            BM=tile.block_m,
            A2=a2,
            B2=b2,
            BN=tile.block_n,
            **shared,
        )
    return y, p, q
