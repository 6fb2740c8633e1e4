"""``lowrank_linear`` in one launch: the rank-sized intermediate stays in registers.

A program owns block_m rows: it makes h = x down^T for all of the rank, rounds it, and walks its share of the columns of
y = act(h up^T + bias + residual). The backward pass dx = (dy up) down is this kernel with the factors swapped, which is
why both strides of both factors are arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, launch
from .tiles import Tile, pieces


# fmt: off
@triton.jit(do_not_specialize=["M", "splits"])
def linear_kernel(
    x, down, up, bias, residual, y, hidden, pre,
    M, splits,
    K, N, R, RP, stride_x, stride_dr, stride_dk, stride_un, stride_ur, stride_residual, stride_y,
    stride_h,
    BM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    # Programs that share rows are neighbours, so that they find x in the L2 cache.
    program = tl.program_id(0)
    part = program % splits
    row = (program // splits).to(tl.int64) * BM + tl.arange(0, BM)
    ha, hb = blocks.project(
        x, down, row, M, K, R, RP, stride_x, stride_dr, stride_dk, BM, A, B, BK, False,
        PRECISION, UPCAST,
    )
    if hidden is not None:
        if part == 0:
            blocks.store_pieces(ha, hb, hidden, row, M, R, stride_h, A, B)
    width = tl.cdiv(tl.cdiv(N, BN), splits) * BN
    blocks.expand(
        ha, hb, up, bias, residual, y, pre, row, M,
        part * width, tl.minimum(part * width + width, N), N, RP,
        stride_un, stride_ur, stride_residual, stride_y, A, B, BM, BN, ACTIVATION, PRECISION, UPCAST,
    )
# fmt: on


class LinearPlan:
    """``linear`` with its factors in place: call it with what is left of the arguments."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> None:
        self.outer, self.rank = up.shape
        self.down, self.up, padded = launch.aligned(down, up)
        self.bias, self.activation = launch.contiguous(bias), activation
        self.pieces = pieces(self.rank)
        self.tiles: dict[int, Tile] = {}
        self.numbers = (self.down.shape[1], self.outer, self.rank, padded)
        self.strides = (*self.down.stride(), *self.up.stride())

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        save_hidden: bool = False,
        save_pre: bool = False,
        tile: Tile | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = launch.rows_of(x)
        residual = None if residual is None else launch.rows_of(residual)
        rows, outer, rank = x.shape[0], self.outer, self.rank
        y = x.new_empty(rows, outer)
        hidden = x.new_empty(rows, rank) if save_hidden else None
        pre = torch.empty_like(y) if save_pre else None
        if rows == 0 or outer == 0:
            return y, hidden, pre
        tile = launch.resolve_tile("linear", tile, x, rank, outer, self.tiles)
        launch.launch(
            linear_kernel,
            -(-rows // tile.block_m) * tile.splits,
            tile,
            (x, self.down, self.up, self.bias, residual, y, hidden, pre),
            (rows, tile.splits),
            (
                *self.numbers,
                x.stride(0),
                *self.strides,
                0 if residual is None else residual.stride(0),
                outer,
                rank,
            ),
            (
                tile.block_m,
                *self.pieces,
                tile.block_k,
                tile.block_n,
                self.activation,
                launch.precision(x),
                launch.upcast(x),
            ),
        )
        return y, hidden, pre


def linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    save_hidden: bool = False,
    save_pre: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form of ``lowrank_linear`` on x (rows, in); see ``lowrank_kernels.reference.linear``."""
    return LinearPlan(down, up, bias, activation)(x, residual, save_hidden, save_pre, tile)
