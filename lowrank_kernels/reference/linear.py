"""``lowrank_linear`` as two library matmuls, and as one with the product of the factors."""

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
    y, pre = _finish(F.linear(hidden, up, bias), residual, activation, save_pre)
    return y, hidden if save_hidden else None, pre


def dense_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    save_hidden: bool = False,
    save_pre: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form by one matmul with W = up down, made for the call: for ranks near break-even and many rows."""
    y, pre = _finish(F.linear(x, up @ down, bias), residual, activation, save_pre)
    return y, F.linear(x, down) if save_hidden else None, pre


def _finish(
    z: Tensor, residual: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """act(z + residual), and the sum itself if asked for; the two never share memory."""
    if residual is not None:
        z = z + residual
    y = activations.apply(activation, z)
    if not save_pre:
        return y, None
    return (y.clone() if y is z else y), z
