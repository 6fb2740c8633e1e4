"""The device functions that every kernel is made of: project to the rank, expand from it, activate.

A block that is as wide as the rank is held as two pieces of power-of-two widths A >= B (B may be 0), because Triton's
blocks are powers of two: rank 192 is 128 + 64 and rank 384 is 256 + 128, where one block would be padded to 256 and
512. With B = 0 the second piece is an alias of the first that no code reads.

All products accumulate in float32. Offsets that grow with the number of rows are 64-bit; offsets inside a factor are
32-bit (the launchers check that no factor reaches 2**31 elements).
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a @ b. UPCAST is for Triton's interpreter only, whose 16-bit bfloat dot is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def cast(value, like, UPCAST: tl.constexpr):
    """A float32 value rounded to the element type behind the pointer ``like``.

    UPCAST repairs the interpreter, which truncates to bfloat16: round to nearest even on the bits, NaN left alone.
    """
    if UPCAST:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(like.dtype.element_ty)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in float32, with the limits at the infinities; NaN stays NaN under every activation.

    Both GELUs are -0 in float32 well above -64, so that the clamp changes nothing but -Inf, which would give -Inf * 0.
    """
    if ACTIVATION == "gelu":
        z = tl.maximum(z, -64.0, propagate_nan=tl.PropagateNan.ALL)
        return 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        z = tl.maximum(z, -64.0, propagate_nan=tl.PropagateNan.ALL)
        return z / (1.0 + tl.exp((z + 0.044715 * z * z * z) * (-2.0 * _SQRT_2_OVER_PI)))
    elif ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)
    else:
        return z


@triton.jit
def project_piece(
    ha,
    tile,
    factor,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of a piece of x @ down.T: factor is (BK, W). A TRANSPOSED piece is accumulated as (W, BM)."""
    if TRANSPOSED:
        return dot(tl.trans(factor), tl.trans(tile), ha, PRECISION, UPCAST)
    else:
        return dot(tile, factor, ha, PRECISION, UPCAST)


@triton.jit
def finish_piece(
    ha, like, first, R, W: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr
):
    """Round a piece; columns beyond the rank become 0, which they are not yet if x holds Inf or NaN."""
    if TRANSPOSED:
        ha = tl.trans(ha)
    column = first + tl.arange(0, W)
    return cast(tl.where((column < R)[None, :], ha, 0.0), like, UPCAST)


@triton.jit
def project(
    x,
    down,
    row,
    rows,
    K,
    R,
    RP,
    stride_x,
    stride_dr,
    stride_dk,
    BM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The (BM, A) and (BM, B) pieces of x[row] @ down.T, rounded to the dtype of x as F.linear would round them.

    ``row`` is a block of BM row numbers (int64), ``rows`` their count in x; rows beyond it read as zero. ``down`` has
    RP rows of which R count. TRANSPOSED computes the pieces as (down @ x.T).T: in that layout Hopper's compiler keeps
    them in shared memory when they become the left operand of the next product, where otherwise they take registers.
    """
    k = tl.arange(0, BK)
    a = tl.arange(0, A)
    x_at = x + row[:, None] * stride_x + k[None, :]
    a_at = down + a[None, :] * stride_dr + k[:, None] * stride_dk
    inside = (row < rows)[:, None]
    TRANSPOSED_B: tl.constexpr = TRANSPOSED and B >= 64
    if TRANSPOSED:
        ha = tl.zeros((A, BM), tl.float32)
    else:
        ha = tl.zeros((BM, A), tl.float32)
    if B > 0:
        b = A + tl.arange(0, B)
        b_at = down + b[None, :] * stride_dr + k[:, None] * stride_dk
        if TRANSPOSED_B:
            hb = tl.zeros((B, BM), tl.float32)
        else:
            hb = tl.zeros((BM, B), tl.float32)
    for first in range(0, K, BK):
        left = K - first
        tile = tl.load(x_at, mask=inside & (k < left)[None, :], other=0.0)
        factor = tl.load(a_at, mask=(a < RP)[None, :] & (k < left)[:, None], other=0.0)
        ha = project_piece(ha, tile, factor, TRANSPOSED, PRECISION, UPCAST)
        a_at += BK * stride_dk
        if B > 0:
            factor = tl.load(b_at, mask=(b < RP)[None, :] & (k < left)[:, None], other=0.0)
            hb = project_piece(hb, tile, factor, TRANSPOSED_B, PRECISION, UPCAST)
            b_at += BK * stride_dk
        x_at += BK
    ha = finish_piece(ha, x, 0, R, A, TRANSPOSED, UPCAST)
    if B > 0:
        return ha, finish_piece(hb, x, A, R, B, TRANSPOSED_B, UPCAST)
    else:
        return ha, ha


@triton.jit
def expand_tile(
    ha,
    hb,
    up,
    first,
    N,
    RP,
    stride_un,
    stride_ur,
    A: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Columns first..first + BN of h @ up.T, in float32; columns beyond N come out as zero."""
    n = first + tl.arange(0, BN)
    a = tl.arange(0, A)
    up_at = up + a[:, None] * stride_ur + n[None, :] * stride_un
    factor = tl.load(up_at, mask=(a < RP)[:, None] & (n < N)[None, :], other=0.0)
    z = dot(ha, factor, tl.zeros((BM, BN), tl.float32), PRECISION, UPCAST)
    if B > 0:
        b = A + tl.arange(0, B)
        up_at = up + b[:, None] * stride_ur + n[None, :] * stride_un
        factor = tl.load(up_at, mask=(b < RP)[:, None] & (n < N)[None, :], other=0.0)
        z = dot(hb, factor, z, PRECISION, UPCAST)
    return z


@triton.jit
def store_pieces(
    ha,
    hb,
    out,
    row,
    rows,
    R,
    stride,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Store the two pieces of a rank-wide block into the rows of ``out``."""
    inside = (row < rows)[:, None]
    a = tl.arange(0, A)
    tl.store(out + row[:, None] * stride + a[None, :], ha, mask=inside & (a < R)[None, :])
    if B > 0:
        b = A + tl.arange(0, B)
        tl.store(out + row[:, None] * stride + b[None, :], hb, mask=inside & (b < R)[None, :])


@triton.jit
def expand(
    ha,
    hb,
    up,
    bias,
    residual,
    y,
    pre,
    row,
    rows,
    begin,
    end,
    N,
    RP,
    stride_un,
    stride_ur,
    stride_residual,
    stride_y,
    A: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Columns begin..end of y = act(h @ up.T + bias + residual), BN at a time; ``pre`` gets the sum before act."""
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)
        z = expand_tile(
            ha, hb, up, first, N, RP, stride_un, stride_ur, A, B, BM, BN, PRECISION, UPCAST
        )
        inside = (row < rows)[:, None] & (n < N)[None, :]
        if bias is not None:
            z += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            z += tl.load(
                residual + row[:, None] * stride_residual + n[None, :], mask=inside, other=0.0
            ).to(tl.float32)
        at = row[:, None] * stride_y + n[None, :]
        if pre is not None:
            tl.store(pre + at, cast(z, y, UPCAST), mask=inside)
        tl.store(y + at, cast(activate(z, ACTIVATION), y, UPCAST), mask=inside)
