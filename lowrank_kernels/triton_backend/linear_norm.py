"""``lowrank_linear_norm`` in one launch: LayerNorm(residual + (x down^T) up^T + bias).

A row of the output is wider than the registers, so the row is walked twice by the program that owns it: the first walk
writes the sum (rounded, as the unfused sum would be) and gathers mean and variance tile by tile with Chan's update, the
second reads its own, still cached writes back and normalises them. No other program touches the row, so the result does
not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, launch
from .tiles import Tile, pieces


# fmt: off
@triton.jit(do_not_specialize=["M"])
def linear_norm_kernel(
    x, down, up, bias, residual, weight, shift, y, hidden, pre,
    M,
    K, N, R, RP, stride_x, stride_dr, stride_dk, stride_un, stride_ur, stride_residual, eps,
    BM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ha, hb = blocks.project(
        x, down, row, M, K, R, RP, stride_x, stride_dr, stride_dk, BM, A, B, BK, False,
        PRECISION, UPCAST,
    )
    if hidden is not None:
        blocks.store_pieces(ha, hb, hidden, row, M, R, R, A, B)
    mean = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        inside = (row < M)[:, None] & (n < N)[None, :]
        z = blocks.expand_tile(
            ha, hb, up, first, N, RP, stride_un, stride_ur, A, B, BM, BN, PRECISION, UPCAST
        )
        if bias is not None:
            z += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        z += tl.load(
            residual + row[:, None] * stride_residual + n[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        z = blocks.cast(z, y, UPCAST)
        tl.store(pre + row[:, None] * N + n[None, :], z, mask=inside)
        z = z.to(tl.float32)
        # Chan, Golub and LeVeque: merge the tile's mean and sum of squares into those of the columns before it.
        count = tl.minimum(N - first, BN).to(tl.float32)
        total = first + count
        tile_mean = tl.sum(tl.where((n < N)[None, :], z, 0.0), 1) / count
        spread = tl.where((n < N)[None, :], z - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        mean += delta * (count / total)
        square += tl.sum(spread * spread, 1) + delta * delta * (first * count / total)
    rstd = tl.rsqrt(square / N + eps)
    # Other threads of this program may hold the elements that this one wrote.
    tl.debug_barrier()
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        inside = (row < M)[:, None] & (n < N)[None, :]
        z = tl.load(pre + row[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)
        offset = tl.load(shift + n, mask=n < N, other=0.0).to(tl.float32)
        out = (z - mean[:, None]) * rstd[:, None] * scale[None, :] + offset[None, :]
        tl.store(y + row[:, None] * N + n[None, :], blocks.cast(out, y, UPCAST), mask=inside)
# fmt: on


class LinearNormPlan:
    """``linear_norm`` with its factors and norm in place: call it with what is left of the arguments."""

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        eps: float,
    ) -> None:
        self.outer, self.rank = up.shape
        self.down, self.up, padded = launch.aligned(down, up)
        self.bias, self.eps = launch.contiguous(bias), eps
        self.weight, self.shift = weight.contiguous(), shift.contiguous()
        self.pieces = pieces(self.rank)
        self.tiles: dict[int, Tile] = {}
        self.numbers = (self.down.shape[1], self.outer, self.rank, padded)
        self.strides = (*self.down.stride(), *self.up.stride())

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        save_hidden: bool = False,
        save_pre: bool = False,
        tile: Tile | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, residual = launch.rows_of(x), launch.rows_of(residual)
        rows, outer, rank = x.shape[0], self.outer, self.rank
        y = x.new_empty(rows, outer)
        hidden = x.new_empty(rows, rank) if save_hidden else None
        pre = torch.empty_like(y) if save_pre else None
        if rows == 0 or outer == 0:
            return y, hidden, pre
        tile = launch.resolve_tile("linear_norm", tile, x, rank, outer, self.tiles)
        factors = (self.down, self.up, self.bias)
        results = (y, hidden, y if pre is None else pre)
        launch.launch(
            linear_norm_kernel,
            -(-rows // tile.block_m),
            tile,
            (x, *factors, residual, self.weight, self.shift, *results),
            (rows,),
            (*self.numbers, x.stride(0), *self.strides, residual.stride(0), self.eps),
            (
                tile.block_m,
                *self.pieces,
                tile.block_k,
                tile.block_n,
                launch.precision(x),
                launch.upcast(x),
            ),
        )
        return y, hidden, pre


def linear_norm(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    save_hidden: bool = False,
    save_pre: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form of ``lowrank_linear_norm`` on x (rows, in); see ``lowrank_kernels.reference.linear_norm``."""
    plan = LinearNormPlan(down, up, bias, weight, shift, eps)
    return plan(x, residual, save_hidden, save_pre, tile)
