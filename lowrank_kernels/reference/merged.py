"""Library calls on factors that were put together once: merged to dense weights, or with their first factors stacked.

Both are rivals of the fused kernels on every GPU. A merged weight is up @ down, computed in float32 and rounded, so the
results are those of the two factors up to rounding; where a rank is near break-even, or rows are few, one matmul may be
faster than two. Query, key and value become one weight, or share one product with the three ``down``. The new weights
are copies: they do not follow a factor that changes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations

Call = Callable[..., tuple]


@torch.no_grad()
def merge(down: Tensor, up: Tensor) -> Tensor:
    """The dense weight (out, in) of down (rank, in) and up (out, rank), in their dtype."""
    exact = up if up.dtype == torch.float64 else up.float()
    return (exact @ down.to(exact.dtype)).to(up.dtype)


def dense_linear(down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Call:
    """``linear`` as one matmul."""
    weight = merge(down, up)
    return lambda x: (activations.apply(activation, F.linear(x, weight, bias)),)


def _concatenated(biases: Sequence[Tensor | None], ups: Sequence[Tensor]) -> Tensor | None:
    """The biases in a row, zeros for None; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, ups, strict=True)
    return torch.cat([up.new_zeros(up.shape[0]) if bias is None else bias for bias, up in pairs])


@torch.no_grad()
def dense_qkv(
    downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Call:
    """``qkv`` as one matmul; the three results are views of one tensor."""
    weight = torch.cat([merge(down, up) for down, up in zip(downs, ups, strict=True)])
    bias, widths = _concatenated(biases, ups), [up.shape[0] for up in ups]
    return lambda x: (F.linear(x, weight, bias).split(widths, 1),)


@torch.no_grad()
def stacked_qkv(
    downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Call:
    """``qkv`` as one product with the three first factors and three with the second ones."""
    stack, ranks = torch.cat(list(downs)), [down.shape[0] for down in downs]

    def call(x: Tensor) -> tuple:
        hiddens = F.linear(x, stack).split(ranks, 1)
        parts = zip(hiddens, ups, biases, strict=True)
        return (tuple(F.linear(hidden, up, bias) for hidden, up, bias in parts),)

    return call


def dense_ffn(
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> Call:
    """``ffn`` as two matmuls around the activation."""
    first, second = merge(down1, up1), merge(down2, up2)

    def call(x: Tensor) -> tuple:
        neurons = activations.apply(activation, F.linear(x, first, bias1))
        return (F.linear(neurons, second, bias2),)

    return call


def dense_linear_norm(
    down: Tensor, up: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> Call:
    """``linear_norm`` as one matmul, an addition and a LayerNorm."""
    merged = merge(down, up)

    def call(x: Tensor, residual: Tensor) -> tuple:
        total = F.linear(x, merged, bias).add_(residual)
        return (F.layer_norm(total, total.shape[-1:], weight, shift, eps),)

    return call
