"""``lowrank_qkv`` as six library matmuls."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def qkv(
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    save_hidden: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """(x down_i^T) up_i^T + bias_i for the three pairs i; x (..., in). The intermediates come back if asked for."""
    hiddens = tuple(F.linear(x, down) for down in downs)
    outs = tuple(
        F.linear(hidden, up, bias) for hidden, up, bias in zip(hiddens, ups, biases, strict=True)
    )
    return outs, hiddens if save_hidden else None
