"""``lowrank_linear`` as two library matmuls."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import activations


def linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act((x down^T) up^T + bias) for x (..., in), down (rank, in), up (out, rank), bias (out) or None.

    Autograd is torch's own. Each F.linear rounds its result to the dtype of ``x``: the fused kernels round the
    rank-sized intermediate at the same place, so that fused and unfused differ only in the order of summation.
    """
    y = F.linear(F.linear(x, down), up, bias)
    return y if activation == "none" else activations.apply(activation, y)


def linear_saving(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    save_hidden: bool = False,
    save_pre: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form on x (rows, in): returns y, the intermediate x down^T, and the sum before the activation.

    ``residual`` (rows, out) is added before the activation. What is not asked for comes back as None.
    """
    hidden = F.linear(x, down)
    pre = F.linear(hidden, up, bias)
    if residual is not None:
        pre = pre + residual
    y = activations.apply(activation, pre)
    if save_pre and y is pre:
        y = pre.clone()
    return y, hidden if save_hidden else None, pre if save_pre else None
