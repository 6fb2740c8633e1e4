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


@triton.jit
def _one(
    x,
    down,
    up,
    bias,
    y,
    hidden,
    row,
    part,
    splits,
    M,
    K,
    N,
    R,
    RP,
    stride_x,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    ha, hb = blocks.project(
        x,
        down,
        row,
        M,
        K,
        R,
        RP,
        stride_x,
        stride_dr,
        stride_dk,
        BM,
        A,
        B,
        BK,
        False,
        PRECISION,
        UPCAST,
    )
    if hidden is not None:
        if part == 0:
            blocks.store_pieces(ha, hb, hidden, row, M, R, R, A, B)
    width = tl.cdiv(tl.cdiv(N, BN), splits) * BN
    blocks.expand(
        ha,
        hb,
        up,
        bias,
        None,
        y,
        None,
        row,
        M,
        part * width,
        tl.minimum(part * width + width, N),
        N,
        RP,
        stride_un,
        stride_ur,
        0,
        N,
        A,
        B,
        BM,
        BN,
        "none",
        PRECISION,
        UPCAST,
    )


@triton.jit
def qkv_kernel(
    x,
    down_q,
    up_q,
    bias_q,
    q,
    hidden_q,
    down_k,
    up_k,
    bias_k,
    k,
    hidden_k,
    down_v,
    up_v,
    bias_v,
    v,
    hidden_v,
    M,
    K,
    NQ,
    NK,
    NV,
    RQ,
    RK,
    RV,
    RPQ,
    RPK,
    RPV,
    stride_x,
    stride_dqr,
    stride_dqk,
    stride_uqn,
    stride_uqr,
    stride_dkr,
    stride_dkk,
    stride_ukn,
    stride_ukr,
    stride_dvr,
    stride_dvk,
    stride_uvn,
    stride_uvr,
    splits,
    BM: tl.constexpr,
    AQ: tl.constexpr,
    BQ: tl.constexpr,
    AK: tl.constexpr,
    BK_: tl.constexpr,
    AV: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    which = program % 3
    part = (program // 3) % splits
    row = (program // 3 // splits).to(tl.int64) * BM + tl.arange(0, BM)
    # Three tests in a row, not a chain: the compiler then lets the three share their shared memory.
    if which == 0:
        _one(
            x,
            down_q,
            up_q,
            bias_q,
            q,
            hidden_q,
            row,
            part,
            splits,
            M,
            K,
            NQ,
            RQ,
            RPQ,
            stride_x,
            stride_dqr,
            stride_dqk,
            stride_uqn,
            stride_uqr,
            BM,
            AQ,
            BQ,
            BK,
            BN,
            PRECISION,
            UPCAST,
        )
    if which == 1:
        _one(
            x,
            down_k,
            up_k,
            bias_k,
            k,
            hidden_k,
            row,
            part,
            splits,
            M,
            K,
            NK,
            RK,
            RPK,
            stride_x,
            stride_dkr,
            stride_dkk,
            stride_ukn,
            stride_ukr,
            BM,
            AK,
            BK_,
            BK,
            BN,
            PRECISION,
            UPCAST,
        )
    if which == 2:
        _one(
            x,
            down_v,
            up_v,
            bias_v,
            v,
            hidden_v,
            row,
            part,
            splits,
            M,
            K,
            NV,
            RV,
            RPV,
            stride_x,
            stride_dvr,
            stride_dvk,
            stride_uvn,
            stride_uvr,
            BM,
            AV,
            BV,
            BK,
            BN,
            PRECISION,
            UPCAST,
        )


def qkv(
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    save_hidden: bool = False,
    tile: Tile | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """The backend form of ``lowrank_qkv`` on x (rows, in); see ``lowrank_kernels.reference.qkv``."""
    x = launch.rows_of(x)
    rows, inner = x.shape
    outs = tuple(x.new_empty(rows, up.shape[0]) for up in ups)
    hiddens = tuple(x.new_empty(rows, up.shape[1]) for up in ups) if save_hidden else None
    widest = max(up.shape[0] for up in ups)
    if rows == 0 or widest == 0:
        return outs, hiddens
    tile = launch.resolve_tile("qkv", tile, x, max(up.shape[1] for up in ups), widest)
    pointers, paddings, strides, cuts = [], [], [], []
    for index, (down, up, bias) in enumerate(zip(downs, ups, biases)):
        down, up, padded = launch.aligned(down, up)
        paddings.append(padded)
        pointers += [down, up, None if bias is None else bias.contiguous(), outs[index]]
        pointers.append(None if hiddens is None else hiddens[index])
        strides += [*down.stride(), *up.stride()]
        cuts += pieces(padded)
    qkv_kernel[(3 * triton.cdiv(rows, tile.block_m) * tile.splits,)](
        x,
        *pointers,
        rows,
        inner,
        *(up.shape[0] for up in ups),
        *(up.shape[1] for up in ups),
        *paddings,
        x.stride(0),
        *strides,
        tile.splits,
        tile.block_m,
        *cuts,
        tile.block_k,
        tile.block_n,
        **launch.numeric_options(x),
        **launch.launch_options(tile),
    )
    return outs, hiddens
