"""``lowrank_linear_norm`` as two library matmuls, an addition and a LayerNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm(residual + (x down^T) up^T + bias) * weight + shift over the last dimension; x (..., in).

    Returns y and, if asked for, the intermediate x down^T and the sum that was normalised (else None).
    """
    hidden = F.linear(x, down)
    pre = F.linear(hidden, up, bias) + residual
    y = F.layer_norm(pre, pre.shape[-1:], weight, shift, eps)
    return y, hidden if save_hidden else None, pre if save_pre else None
