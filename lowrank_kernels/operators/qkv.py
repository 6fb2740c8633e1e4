"""``lowrank_qkv``: three low-rank projections of one input in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..problem import Problem
from ..reference.qkv import qkv as reference_qkv
from . import library
from .linear import factor_gradients


def lowrank_qkv(
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x down_i^T) up_i^T + bias_i for query, key and value.

    >>> import torch
    >>> downs, ups = ([torch.ones(*shape) for _ in range(3)] for shape in ((3, 8), (4, 3)))
    >>> query, key, value = lowrank_qkv(torch.ones(2, 5, 8), downs, ups)
    >>> query.shape
    torch.Size([2, 5, 4])

    Args:
        x: (..., in_features), any leading dimensions and strides.
        downs: three of (rank_i, in_features); the ranks may differ.
        ups: three of (out_features_i, rank_i).
        biases: three of (out_features_i) or None each, or None for no bias at all.
        backend: None or "auto" for the automatic choice, or a backend's name.

    Returns:
        Three of (..., out_features_i) in the dtype of ``x`` (of autocast, where that is on).

    Raises:
        ValueError: there are not three of each, or a shape, a device or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    biases = (None, None, None) if biases is None else tuple(biases)
    for name, triple in (("downs", downs), ("ups", ups), ("biases", biases)):
        if len(triple) != 3:
            raise ValueError(f"{name} has {len(triple)} entries; it needs 3: query, key and value")
    for index in range(3):
        checks.factors(x, downs[index], ups[index], biases[index], f"[{index}]")
    outer, rank = (max(up.shape[index] for up in ups) for index in (0, 1))
    backend = dispatch.settle(backend, x, "qkv", outer, rank)
    if backend == "torch":
        query, key, value = reference_qkv(x, downs, ups, biases)[0]
        return query, key, value
    (down_q, down_k, down_v), (up_q, up_k, up_v), (bias_q, bias_k, bias_v) = downs, ups, biases
    x, *flat = library.autocast(x, down_q, up_q, bias_q, down_k, up_k, bias_k, down_v, up_v, bias_v)
    save = library.wants_gradient(*flat[1::3])
    outputs = library.OPS.qkv(library.flat(x), *flat, save, backend)
    query, key, value = (library.unflat(y, x) for y in outputs[:3])
    return query, key, value


def _run(x, *rest):
    (*flat, save_hidden, backend) = rest
    downs, ups, biases = flat[0::3], flat[1::3], flat[2::3]
    problem = Problem(
        "qkv",
        x.shape[0],
        x.shape[1],
        max(up.shape[0] for up in ups),
        max(up.shape[1] for up in ups),
        x.dtype,
    )
    outs, hiddens = dispatch.run(backend, problem, x.device, x, downs, ups, biases, save_hidden)
    return *outs, *(library.or_empty(hidden, x) for hidden in hiddens or (None, None, None))


def _fake(x, *rest):
    (*flat, save_hidden, _) = rest
    ups = flat[1::3]
    outs = tuple(x.new_empty(x.shape[0], up.shape[0]) for up in ups)
    return *outs, *(
        x.new_empty(x.shape[0], up.shape[1]) if save_hidden else x.new_empty(0) for up in ups
    )


def _setup(ctx, inputs, output):
    (*tensors, ctx.save_hidden, ctx.backend) = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output[3:])


def _backward(ctx, *grads):
    x, *rest = ctx.saved_tensors
    flat, hiddens = rest[:9], rest[9:]
    needs_x, *needs = ctx.needs_input_grad[:10]
    grad_x = None
    results: list[Tensor | None] = []
    for index in range(3):
        down, up, _ = flat[3 * index : 3 * index + 3]
        needs_down, needs_up, needs_bias = needs[3 * index : 3 * index + 3]
        grad = grads[index]
        # Each launch adds its part of dx onto the sum of those before it.
        part, grad_down = factor_gradients(
            grad, x, down, up, grad_x, needs_x, needs_down, ctx.backend
        )
        grad_x = part
        grad_up = None
        if needs_up:
            grad_up = grad.t() @ (hiddens[index] if ctx.save_hidden else F.linear(x, down))
        results += [grad_down, grad_up, grad.sum(0) if needs_bias else None]
    return grad_x, *results, None, None


library.register(
    "qkv(Tensor x, Tensor down_q, Tensor up_q, Tensor? bias_q, Tensor down_k, Tensor up_k, Tensor? bias_k, "
    "Tensor down_v, Tensor up_v, Tensor? bias_v, bool save_hidden, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup,
    _backward,
)
