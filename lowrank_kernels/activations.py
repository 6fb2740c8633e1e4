"""The activations every operator knows, by the one name used in options, kernels, tables and tests.

``none`` (or None), ``gelu`` (erf), ``gelu_tanh`` (the tanh approximation) and ``relu``.

At the infinities the Triton and CUDA kernels give the limits: act(+Inf) = Inf, and 0 at -Inf for all but ``none``;
NaN stays NaN. The ``torch`` backend gives what torch's own activation gives there, which depends on the processor: on
some, ``F.gelu`` of an infinity is NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("none", "gelu", "gelu_tanh", "relu")


def canonical(name: str | None) -> str:
    """Return the activation's name, with None meaning "none".

    Raises:
        ValueError: the name is not one of ``NAMES``.
    """
    if name is None:
        return "none"
    if name not in NAMES:
        raise ValueError(f"activation is {name!r}; it must be None or one of {', '.join(NAMES)}")
    return name


def apply(name: str, z: Tensor) -> Tensor:
    """act(z), elementwise, in the dtype of ``z``; ``name`` is canonical."""
    if name == "none":
        return z
    if name == "relu":
        return torch.relu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def gradient(name: str, grad: Tensor, z: Tensor) -> Tensor:
    """grad * act'(z), elementwise, by the same ATen kernels that autograd uses."""
    if name == "none":
        return grad
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    return torch.ops.aten.gelu_backward(
        grad, z, approximate="tanh" if name == "gelu_tanh" else "none"
    )
