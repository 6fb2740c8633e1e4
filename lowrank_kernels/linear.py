"""``lowrank_linear``: the public function."""

from __future__ import annotations

from torch import Tensor

from . import checks, dispatch
from .activations import canonical
from .reference.linear import linear as reference_linear


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act((x down^T) up^T + bias).

    Args:
        x: (..., in_features), any leading dimensions and strides; bfloat16, float16, float32 (float64 on ``torch``).
        down: (rank, in_features), first factor.
        up: (out_features, rank), second factor.
        bias: (out_features) or None.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
        backend: None or "auto" for the automatic choice, or a backend's name.

    Returns:
        (..., out_features) in the dtype of ``x`` (of autocast, where that is on).

    Raises:
        ValueError: a shape, a device, the activation or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    checks.factors(x, down, up, bias)
    activation = canonical(activation)
    backend = dispatch.route(x, backend)
    if backend == "torch":
        return reference_linear(x, down, up, bias, activation)
    raise ValueError(f"backend is {backend!r}; it must be None, 'auto' or torch")
