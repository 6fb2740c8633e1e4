"""``norm`` in one pass: LayerNorm(x + residual), what stands between any two matrices of an encoder layer.

A program holds a row in registers, so both inputs are read once, the result is written once, and the sum is never
rounded. Nothing but memory limits it, which is why it has no tiles to tune.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks, launch
from .tiles import Tile


# fmt: off
@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x, residual, weight, shift, y,
    M,
    N, stride_x, stride_residual, eps,
    W: tl.constexpr, UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, W)
    inside = n < N
    z = tl.load(x + row * stride_x + n, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(residual + row * stride_residual + n, mask=inside, other=0.0).to(tl.float32)
    # Two passes over registers: the square of the sum would lose what a large mean leaves.
    spread = tl.where(inside, z - tl.sum(z, 0) / N, 0.0)
    rstd = tl.rsqrt(tl.sum(spread * spread, 0) / N + eps)
    scale = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + n, mask=inside, other=0.0).to(tl.float32)
    out = spread * rstd * scale + offset
    tl.store(y + row * N + n, blocks.cast(out, y, UPCAST), mask=inside)
# fmt: on


class NormPlan:
    """``norm`` with its vectors in place: call it with x and residual (rows, width)."""

    def __init__(self, weight: Tensor, shift: Tensor, eps: float) -> None:
        self.weight, self.shift, self.eps = weight.contiguous(), shift.contiguous(), eps
        self.width = weight.shape[0]
        self.block = triton.next_power_of_2(max(self.width, 1))
        # About eight elements a thread.
        warps = min(max(self.block // 256, 1), 16)
        self.tile = Tile(1, self.block, 0, 0, warps, 1)

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, None, None]:
        x, residual = launch.rows_of(x), launch.rows_of(residual)
        rows = x.shape[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rows and self.width:
            launch.launch(
                norm_kernel,
                rows,
                self.tile,
                (x, residual, self.weight, self.shift, y),
                (rows,),
                (self.width, x.stride(0), residual.stride(0), self.eps),
                (self.block, launch.upcast(x)),
            )
        return y, None, None


def norm(
    x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, None, None]:
    """The backend form of LayerNorm(x + residual); see ``lowrank_kernels.reference.norm``."""
    return NormPlan(weight, shift, eps)(x, residual)
