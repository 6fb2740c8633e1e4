"""``lowrank_linear_norm``: LayerNorm(residual + (x down^T) up^T + bias), the end of both halves of an encoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..problem import Problem
from ..reference.linear_norm import linear_norm as reference_linear_norm
from . import library
from .linear import factor_gradients


def lowrank_linear_norm(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(residual + (x down^T) up^T + bias) * norm_weight + norm_bias, over the last dimension.

    >>> x, down, up, one = torch.ones(2, 8), torch.ones(3, 8), torch.ones(4, 3), torch.ones(4)
    >>> y = lowrank_linear_norm(x, down, up, one, torch.randn(2, 4), one, 0 * one)
    >>> bool(y.mean(-1).abs().max() < 1e-5)
    True

    Args:
        x: (..., in_features), any leading dimensions and strides.
        down, up, bias: (rank, in_features), (out_features, rank), (out_features) or None.
        residual: (..., out_features), with the leading dimensions of ``x``.
        norm_weight, norm_bias: (out_features).
        eps: added to the variance; BERT's default.
        backend: None or "auto" for the automatic choice, or a backend's name.

    Returns:
        (..., out_features) in the dtype of ``x`` (of autocast, where that is on, for every backend).

    Raises:
        ValueError: a shape, a device or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    checks.factors(x, down, up, bias)
    checks.row_like("residual", residual, x, up.shape[0])
    checks.norm(x, up, norm_weight, norm_bias)
    backend = dispatch.settle(backend, x, "linear_norm", *up.shape)
    x, down, up, bias, residual, norm_weight, norm_bias = library.autocast(
        x, down, up, bias, residual, norm_weight, norm_bias
    )
    if backend == "torch":
        if not torch.is_autocast_enabled(x.device.type):
            return reference_linear_norm(x, down, up, bias, residual, norm_weight, norm_bias, eps)[
                0
            ]
        # Autocast would give LayerNorm's result in float32 here and nowhere else.
        with torch.autocast(x.device.type, enabled=False):
            return reference_linear_norm(x, down, up, bias, residual, norm_weight, norm_bias, eps)[
                0
            ]
    gradient = library.wants_gradient(x, down, up, bias, residual, norm_weight, norm_bias)
    y, _, _ = library.OPS.linear_norm(
        library.flat(x),
        down,
        up,
        bias,
        library.flat(residual),
        norm_weight,
        norm_bias,
        eps,
        gradient and up.requires_grad,
        gradient,
        backend,
    )
    return library.unflat(y, x)


def _run(x, down, up, bias, residual, weight, shift, eps, save_hidden, save_pre, backend):
    problem = Problem("linear_norm", x.shape[0], x.shape[1], up.shape[0], up.shape[1], x.dtype)
    y, hidden, pre = dispatch.run(
        backend,
        problem,
        x.device,
        x,
        down,
        up,
        bias,
        residual,
        weight,
        shift,
        eps,
        save_hidden,
        save_pre,
    )
    return y, library.or_empty(hidden, x), library.or_empty(pre, x)


def _fake(x, down, up, bias, residual, weight, shift, eps, save_hidden, save_pre, backend):
    rows, outer = x.shape[0], up.shape[0]
    return (
        x.new_empty(rows, outer),
        x.new_empty(rows, up.shape[1]) if save_hidden else x.new_empty(0),
        x.new_empty(rows, outer) if save_pre else x.new_empty(0),
    )


def _setup(ctx, inputs, output):
    (
        x,
        down,
        up,
        bias,
        residual,
        weight,
        shift,
        ctx.eps,
        ctx.save_hidden,
        ctx.save_pre,
        ctx.backend,
    ) = inputs
    _, hidden, pre = output
    ctx.mark_non_differentiable(hidden, pre)
    ctx.save_for_backward(x, down, up, bias, residual, weight, shift, hidden, pre)


def _backward(ctx, grad, _hidden, _pre):
    x, down, up, bias, residual, weight, shift, hidden, pre = ctx.saved_tensors
    if not ctx.save_pre:
        pre = library.OPS.linear(x, down, up, bias, residual, "none", False, False, ctx.backend)[0]
    needs = ctx.needs_input_grad
    shape = pre.shape[-1:]
    _, mean, rstd = torch.ops.aten.native_layer_norm(pre, shape, weight, shift, ctx.eps)
    grad, grad_weight, grad_shift = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), pre, shape, mean, rstd, weight, shift, [True, needs[5], needs[6]]
    )
    if needs[2] and not ctx.save_hidden:
        hidden = F.linear(x, down)
    grad_x, grad_down = factor_gradients(grad, x, down, up, None, needs[0], needs[1], ctx.backend)
    return (
        grad_x,
        grad_down,
        grad.t() @ hidden if needs[2] else None,
        grad.sum(0) if needs[3] else None,
        grad if needs[4] else None,
        grad_weight,
        grad_shift,
        None,
        None,
        None,
        None,
    )


library.register(
    "linear_norm(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor residual, Tensor weight, Tensor shift, "
    "float eps, bool save_hidden, bool save_pre, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup,
    _backward,
)
