"""``lowrank_linear``: y = act((x down^T) up^T + bias + residual)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import activations, checks, dispatch
from ..problem import Problem
from ..reference.linear import linear as reference_linear
from . import library


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act((x down^T) up^T + bias).

    >>> import torch
    >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8), torch.ones(4, 3)
    >>> lowrank_linear(x, down, up, torch.ones(4))
    tensor([[25., 25., 25., 25.],
            [25., 25., 25., 25.]])

    Args:
        x: (..., in_features), any leading dimensions and strides; bfloat16, float16, float32 (float64 on ``torch``).
        down: (rank, in_features), first factor.
        up: (out_features, rank), second factor.
        bias: (out_features) or None.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
        backend: None or "auto" for the automatic choice, or a backend's name.

    Returns:
        (..., out_features) in the dtype of ``x`` (of autocast, where that is on). NaN stays NaN; what an activation
        gives at the infinities is in ``lowrank_kernels.activations``.

    Raises:
        ValueError: a shape, a device, the activation or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    checks.factors(x, down, up, bias)
    activation = activations.canonical(activation)
    backend = dispatch.settle(backend, x, "linear", *up.shape)
    if backend == "torch":
        return reference_linear(x, down, up, bias, activation)
    x, down, up, bias = library.autocast(x, down, up, bias)
    gradient = library.wants_gradient(x, down, up, bias)
    y, _, _ = library.OPS.linear(
        library.flat(x),
        down,
        up,
        bias,
        None,
        activation,
        gradient and up.requires_grad,
        gradient and activation != "none",
        backend,
    )
    return library.unflat(y, x)


def _run(x, down, up, bias, residual, activation, save_hidden, save_pre, backend):
    problem = Problem("linear", x.shape[0], x.shape[1], up.shape[0], up.shape[1], x.dtype)
    y, hidden, pre = dispatch.run(
        backend, problem, x.device, x, down, up, bias, activation, residual, save_hidden, save_pre
    )
    return y, library.or_empty(hidden, x), library.or_empty(pre, x)


def _fake(x, down, up, bias, residual, activation, save_hidden, save_pre, backend):
    rows, outer = x.shape[0], up.shape[0]
    return (
        x.new_empty(rows, outer),
        x.new_empty(rows, up.shape[1]) if save_hidden else x.new_empty(0),
        x.new_empty(rows, outer) if save_pre else x.new_empty(0),
    )


def _setup(ctx, inputs, output):
    x, down, up, bias, residual, ctx.activation, ctx.save_hidden, ctx.save_pre, ctx.backend = inputs
    _, hidden, pre = output
    ctx.mark_non_differentiable(hidden, pre)
    ctx.save_for_backward(x, down, up, bias, residual, hidden, pre)


def _backward(ctx, grad, _hidden, _pre):
    x, down, up, bias, residual, hidden, pre = ctx.saved_tensors
    if ctx.activation != "none":
        if not ctx.save_pre:
            pre = library.OPS.linear(
                x, down, up, bias, residual, "none", False, False, ctx.backend
            )[0]
        grad = activations.gradient(ctx.activation, grad, pre)
    needs_x, needs_down, needs_up, needs_bias, needs_residual = ctx.needs_input_grad[:5]
    if needs_up and not ctx.save_hidden:
        hidden = F.linear(x, down)
    grad_x, grad_down = factor_gradients(grad, x, down, up, None, needs_x, needs_down, ctx.backend)
    return (
        grad_x,
        grad_down,
        grad.t() @ hidden if needs_up else None,
        grad.sum(0) if needs_bias else None,
        grad if needs_residual else None,
        None,
        None,
        None,
        None,
    )


def factor_gradients(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    onto: Tensor | None,
    needs_x: bool,
    needs_down: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of ``down`` from that of z = (x down^T) up^T: dx = (dz up) down (+ onto), ddown = (dz up)^T x.

    dx is the operator itself with the factors swapped, which also hands out dz up for the weight gradient.
    """
    if not needs_x:
        return None, (grad @ up).t() @ x if needs_down else None
    grad_x, grad_hidden, _ = library.OPS.linear(
        grad, up.t(), down.t(), None, onto, "none", needs_down, False, backend
    )
    return grad_x, grad_hidden.t() @ x if needs_down else None


library.register(
    "linear(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual, str activation, bool save_hidden, "
    "bool save_pre, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup,
    _backward,
)
