"""``lowrank_qkv`` in one launch: query, key and value read the same x, each through its own factors and rank.

The three (and their splits) are neighbouring programs on the same rows, so x comes from memory once. Each runs code
made for its own rank: nothing is padded to the widest of the three and no block-diagonal of zeros is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import blocks, launch
from .tiles import Tile, pieces


# fmt: off
@triton.jit
def _one(
    x, down, up, bias, y, hidden, row, part, splits, M, K, N, R, RP,
    stride_x, stride_dr, stride_dk, stride_un, stride_ur,
    BM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    ha, hb = blocks.project(
        x, down, row, M, K, R, RP, stride_x, stride_dr, stride_dk, BM, A, B, BK, False,
        PRECISION, UPCAST,
    )
    if hidden is not None:
        if part == 0:
            blocks.store_pieces(ha, hb, hidden, row, M, R, R, A, B)
    width = tl.cdiv(tl.cdiv(N, BN), splits) * BN
    blocks.expand(
        ha, hb, up, bias, None, y, None, row, M,
        part * width, tl.minimum(part * width + width, N), N, RP,
        stride_un, stride_ur, 0, N, A, B, BM, BN, "none", PRECISION, UPCAST,
    )


@triton.jit(do_not_specialize=["M", "splits"])
def qkv_kernel(
    x,
    down_q, up_q, bias_q, q, hidden_q,
    down_k, up_k, bias_k, k, hidden_k,
    down_v, up_v, bias_v, v, hidden_v,
    M, splits,
    K, NQ, NK, NV, RQ, RK, RV, RPQ, RPK, RPV, stride_x,
    stride_dqr, stride_dqk, stride_uqn, stride_uqr,
    stride_dkr, stride_dkk, stride_ukn, stride_ukr,
    stride_dvr, stride_dvk, stride_uvn, stride_uvr,
    BM: tl.constexpr, AQ: tl.constexpr, BQ: tl.constexpr, AK: tl.constexpr, BK_: tl.constexpr,
    AV: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    which = program % 3
    part = (program // 3) % splits
    row = (program // 3 // splits).to(tl.int64) * BM + tl.arange(0, BM)
    # Three tests in a row, not a chain: the compiler then lets the three share their shared memory.
    if which == 0:
        _one(
            x, down_q, up_q, bias_q, q, hidden_q, row, part, splits, M, K, NQ, RQ, RPQ,
            stride_x, stride_dqr, stride_dqk, stride_uqn, stride_uqr,
            BM, AQ, BQ, BK, BN, PRECISION, UPCAST,
        )
    if which == 1:
        _one(
            x, down_k, up_k, bias_k, k, hidden_k, row, part, splits, M, K, NK, RK, RPK,
            stride_x, stride_dkr, stride_dkk, stride_ukn, stride_ukr,
            BM, AK, BK_, BK, BN, PRECISION, UPCAST,
        )
    if which == 2:
        _one(
            x, down_v, up_v, bias_v, v, hidden_v, row, part, splits, M, K, NV, RV, RPV,
            stride_x, stride_dvr, stride_dvk, stride_uvn, stride_uvr,
            BM, AV, BV, BK, BN, PRECISION, UPCAST,
        )
# fmt: on


class QKVPlan:
    """``qkv`` with its factors in place: call it with what is left of the arguments."""

    def __init__(
        self, downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> None:
        self.outers = tuple(up.shape[0] for up in ups)
        self.ranks = tuple(up.shape[1] for up in ups)
        self.widest, self.rank = max(self.outers), max(self.ranks)
        self.factors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.pieces: list[int] = []
        self.tiles: dict[int, Tile] = {}
        padded: list[int] = []
        strides: list[int] = []
        for down, up, bias in zip(downs, ups, biases, strict=True):
            down, up, rank = launch.aligned(down, up)
            self.factors.append((down, up, launch.contiguous(bias)))
            padded.append(rank)
            strides += [*down.stride(), *up.stride()]
            self.pieces += pieces(rank)
        self.numbers = (downs[0].shape[1], *self.outers, *self.ranks, *padded)
        self.strides = tuple(strides)

    def __call__(
        self, x: Tensor, save_hidden: bool = False, tile: Tile | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        x = launch.rows_of(x)
        rows = x.shape[0]
        outs = tuple(x.new_empty(rows, outer) for outer in self.outers)
        hiddens = tuple(x.new_empty(rows, r) for r in self.ranks) if save_hidden else None
        if rows == 0 or self.widest == 0:
            return outs, hiddens
        tile = launch.resolve_tile("qkv", tile, x, self.rank, self.widest, self.tiles)
        query, key, value = self.factors
        h = hiddens or (None, None, None)
        launch.launch(
            qkv_kernel,
            3 * -(-rows // tile.block_m) * tile.splits,
            tile,
            (x, *query, outs[0], h[0], *key, outs[1], h[1], *value, outs[2], h[2]),
            (rows, tile.splits),
            (*self.numbers, x.stride(0), *self.strides),
            (
                tile.block_m,
                *self.pieces,
                tile.block_k,
                tile.block_n,
                launch.precision(x),
                launch.upcast(x),
            ),
        )
        return outs, hiddens


def qkv(
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    save_hidden: bool = False,
    tile: Tile | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """The backend form of ``lowrank_qkv`` on x (rows, in); see ``lowrank_kernels.reference.qkv``."""
    return QKVPlan(downs, ups, biases)(x, save_hidden, tile)
