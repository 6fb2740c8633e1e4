"""``lowrank_ffn`` as four library matmuls and an activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import activations


def ffn(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_hidden: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = q up2^T + b2 with q = act(p up1^T + b1) down2^T and p = x down1^T; x (..., in).

    Returns y and, if asked for, the two rank-sized intermediates p and q (else None).
    """
    p = F.linear(x, down1)
    q = F.linear(activations.apply(activation, F.linear(p, up1, bias1)), down2)
    y = F.linear(q, up2, bias2)
    return (y, p, q) if save_hidden else (y, None, None)
