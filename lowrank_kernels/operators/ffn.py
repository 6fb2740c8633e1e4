"""``lowrank_ffn``: the whole low-rank feed-forward of a transformer layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import activations, checks, dispatch
from ..problem import Problem
from ..reference.ffn import ffn as reference_ffn
from . import library
from .linear import factor_gradients


def lowrank_ffn(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str | None = "gelu",
    backend: str | None = None,
) -> Tensor:
    """y = act(x down1^T up1^T + bias1) down2^T up2^T + bias2.

    >>> import torch
    >>> x = torch.ones(2, 8)
    >>> first, second = (torch.ones(3, 8), torch.ones(16, 3)), (torch.ones(5, 16), torch.ones(8, 5))
    >>> lowrank_ffn(x, *first, None, *second, None, activation="relu").shape
    torch.Size([2, 8])

    Args:
        x: (..., in_features), any leading dimensions and strides.
        down1, up1, bias1: (rank1, in_features), (neurons, rank1), (neurons) or None.
        down2, up2, bias2: (rank2, neurons), (out_features, rank2), (out_features) or None.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
        backend: None or "auto" for the automatic choice, or a backend's name.

    Returns:
        (..., out_features) in the dtype of ``x`` (of autocast, where that is on). NaN stays NaN; what an activation
        gives at the infinities is in ``lowrank_kernels.activations``.

    Raises:
        ValueError: a shape, a device, the activation or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    checks.factors(x, down1, up1, bias1, "1")
    checks.second_pair(x, up1, down2, up2, bias2)
    activation = activations.canonical(activation)
    rank = max(down1.shape[0], down2.shape[0])
    backend = dispatch.settle(backend, x, "ffn", up2.shape[0], rank, up1.shape[0])
    if backend == "torch":
        return reference_ffn(x, down1, up1, bias1, down2, up2, bias2, activation)[0]
    x, down1, up1, bias1, down2, up2, bias2 = library.autocast(
        x, down1, up1, bias1, down2, up2, bias2
    )
    save = library.wants_gradient(x, down1, up1, bias1, down2, up2, bias2)
    y, _, _ = library.OPS.ffn(
        library.flat(x), down1, up1, bias1, down2, up2, bias2, activation, save, backend
    )
    return library.unflat(y, x)


def _run(x, down1, up1, bias1, down2, up2, bias2, activation, save_hidden, backend):
    rank = max(down1.shape[0], down2.shape[0])
    problem = Problem("ffn", x.shape[0], x.shape[1], up2.shape[0], rank, x.dtype, up1.shape[0])
    y, p, q = dispatch.run(
        backend, problem, x.device, x, down1, up1, bias1, down2, up2, bias2, activation, save_hidden
    )
    return y, library.or_empty(p, x), library.or_empty(q, x)


def _fake(x, down1, up1, bias1, down2, up2, bias2, activation, save_hidden, backend):
    rows = x.shape[0]
    return (
        x.new_empty(rows, up2.shape[0]),
        x.new_empty(rows, up1.shape[1]) if save_hidden else x.new_empty(0),
        x.new_empty(rows, up2.shape[1]) if save_hidden else x.new_empty(0),
    )


def _setup(ctx, inputs, output):
    x, down1, up1, bias1, down2, up2, _, ctx.activation, ctx.save_hidden, ctx.backend = inputs
    _, p, q = output
    ctx.mark_non_differentiable(p, q)
    ctx.save_for_backward(x, down1, up1, bias1, down2, up2, p, q)


def _backward(ctx, grad, _p, _q):
    """Only the rank-sized p and q were kept; the neurons are made again from p, one matmul.

    With z = p up1^T + b1 and a = act(z): da = (dy up2) down2 is the fused linear with swapped factors, dz = da act'(z),
    and dx = (dz up1) down1 the same again.
    """
    x, down1, up1, bias1, down2, up2, p, q = ctx.saved_tensors
    needs_x, needs_down1, needs_up1, needs_bias1, needs_down2, needs_up2, needs_bias2 = (
        ctx.needs_input_grad[:7]
    )
    first = needs_x or needs_down1 or needs_up1 or needs_bias1
    p = p if ctx.save_hidden else F.linear(x, down1)
    z = F.linear(p, up1, bias1)
    neurons = activations.apply(ctx.activation, z)
    if needs_up2 and not ctx.save_hidden:
        q = F.linear(neurons, down2)
    grad_neurons, grad_down2 = factor_gradients(
        grad, neurons, down2, up2, None, first, needs_down2, ctx.backend
    )
    grad_x = grad_down1 = grad_up1 = grad_bias1 = None
    if grad_neurons is not None:
        grad_z = activations.gradient(ctx.activation, grad_neurons, z)
        grad_x, grad_down1 = factor_gradients(
            grad_z, x, down1, up1, None, needs_x, needs_down1, ctx.backend
        )
        grad_up1 = grad_z.t() @ p if needs_up1 else None
        grad_bias1 = grad_z.sum(0) if needs_bias1 else None
    return (
        grad_x,
        grad_down1,
        grad_up1,
        grad_bias1,
        grad_down2,
        grad.t() @ q if needs_up2 else None,
        grad.sum(0) if needs_bias2 else None,
        None,
        None,
        None,
    )


library.register(
    "ffn(Tensor x, Tensor down1, Tensor up1, Tensor? bias1, Tensor down2, Tensor up2, Tensor? bias2, "
    "str activation, bool save_hidden, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup,
    _backward,
)
