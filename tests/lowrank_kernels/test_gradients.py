"""Gradients: the formulas to float64 precision, the kernels within the bound, and torch.library's own checks."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FUSED,
    Sizes,
    arguments,
    assert_no_worse,
    call,
    exact,
    gradients,
)

import lowrank_kernels
from lowrank_kernels.modules import LowRankLinear

ACTIVATIONS = {"linear": (None, "gelu", "gelu_tanh", "relu"), "ffn": ("gelu", "gelu_tanh", "relu")}
HALF = (torch.float16, torch.bfloat16)
TINY = Sizes(rows=3, inner=5, outer=4, rank=3, neurons=6)


def _differentiable(tensors):
    return [index for index, t in enumerate(tensors) if t is not None]


def _leaves(tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("operator", FUSED)
def test_gradcheck_of_the_reference(operator):
    for activation in ACTIVATIONS.get(operator, (None,)):
        tensors = _leaves(exact(arguments(operator, TINY)))
        torch.autograd.gradcheck(
            lambda *t, name=activation: tuple(call(operator, list(t), "torch", name)), tensors
        )


@pytest.mark.parametrize("operator", FUSED)
def test_gradcheck_of_the_written_backward(operator):
    """The operators' own gradient formulas in float64, which no kernel takes: library matmuls run in their place."""
    for activation in ACTIVATIONS.get(operator, (None,)):
        tensors = _leaves(exact(arguments(operator, TINY)))
        torch.autograd.gradcheck(
            lambda *t, name=activation: tuple(call(operator, list(t), "triton", name)), tensors
        )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in HALF)],
    ids=str,
)
@pytest.mark.parametrize("operator", FUSED)
def test_gradients_no_worse_than_unfused(operator, dtype):
    for activation in ACTIVATIONS.get(operator, (None,)):
        tensors = arguments(operator, Sizes(rows=21), dtype)
        wanted = _differentiable(tensors)
        fused, unfused = (
            gradients(operator, tensors, name, wanted, activation) for name in ("triton", "torch")
        )
        assert_no_worse(
            fused, unfused, gradients(operator, exact(tensors), "torch", wanted, activation)
        )


@pytest.mark.slow
@pytest.mark.parametrize("operator", FUSED)
def test_any_subset_of_gradients(operator):
    """Each argument's gradient alone equals the one among all, so nothing depends on what else is asked for."""
    tensors = arguments(operator, Sizes(), torch.float32)
    wanted = _differentiable(tensors)
    together = gradients(operator, tensors, "triton", wanted)
    for position, index in enumerate(wanted):
        alone = gradients(operator, tensors, "triton", [index])
        torch.testing.assert_close(alone[0], together[position], rtol=1e-5, atol=1e-5)


def _raw(operator, tensors, save):
    """The registered operator's arguments."""
    if operator == "linear":
        return (*tensors, None, "gelu", save, save, "triton")
    if operator == "linear_norm":
        return (*tensors, 1e-5, save, save, "triton")
    if operator == "ffn":
        return (*tensors, "gelu", save, "triton")
    x, rest = tensors[0], tensors[1:]
    return (
        x,
        *(t for triple in zip(rest[:3], rest[3:6], rest[6:], strict=True) for t in triple),
        save,
        "triton",
    )


@pytest.mark.slow
@pytest.mark.parametrize("operator", FUSED)
def test_opcheck(operator):
    overload = getattr(torch.ops.lowrank_kernels, operator).default
    tensors = arguments(operator, TINY, torch.float32)
    torch.library.opcheck(overload, _raw(operator, _leaves(tensors), True))
    torch.library.opcheck(
        overload, _raw(operator, tensors, False), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("operator", FUSED)
def test_gradient_without_saved_intermediates(operator):
    """The operator called without saving makes the intermediates again: same gradients."""
    overload = getattr(torch.ops.lowrank_kernels, operator)
    count = 3 if operator == "qkv" else 1
    tensors = arguments(operator, Sizes(), torch.float32)
    results = []
    for save in (True, False):
        leaves = _leaves(tensors)
        outputs = overload(*_raw(operator, leaves, save))[:count]
        results.append(torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves))
    for saved, remade in zip(*results, strict=True):
        torch.testing.assert_close(saved, remade, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", FUSED)
def test_differentiating_twice_is_refused(operator):
    leaves = _leaves(arguments(operator, Sizes(), torch.float32))
    loss = sum(y.sin().sum() for y in call(operator, leaves, "triton"))
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.slow
def test_fullgraph_without_recompiling_per_batch_size():
    """One graph without breaks serves every number of rows, forward and backward, and equals eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = LowRankLinear(50, 65, 13, device=DEVICE)
    layer.backend = "triton"
    feed = arguments("ffn", Sizes(), torch.float32)[1:]
    scale = torch.ones(65, device=DEVICE)

    def model(x):
        y = layer(x)
        q, k, v = lowrank_kernels.lowrank_qkv(x, [layer.down] * 3, [layer.up] * 3, backend="triton")
        y = y + lowrank_kernels.lowrank_ffn(x, *feed, backend="triton") + q * k + v
        return lowrank_kernels.lowrank_linear_norm(
            x, layer.down, layer.up, None, y, scale, scale, backend="triton"
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for count in (5, 9):
        x = torch.randn(2, count, 50, device=DEVICE, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        (gradient,) = torch.autograd.grad(y.sin().sum(), x)
        (right,) = torch.autograd.grad(model(x).sin().sum(), x)
        torch.testing.assert_close(gradient, right)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]
