"""Every fused operator against float64: it may err at most twice as much as the library matmuls that it replaces."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    FUSED,
    Sizes,
    arguments,
    assert_no_worse,
    call,
    check,
    exact,
)

import lowrank_kernels
from lowrank_kernels import backends
from lowrank_kernels.problem import RANK_CLASSES, Problem
from lowrank_kernels.triton_backend import device
from lowrank_kernels.triton_backend.tiles import space

FAMILY = device.facts(DEVICE).family
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD = (
    Sizes(1, 1, 1, 1, 1),
    Sizes(37, 50, 131, 13, 70),
    Sizes(70, 33, 65, 96, 133),
    Sizes(5, 341, 100, 245, 300),
    Sizes(3, 64, 48, 384, 64),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ODD, ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_no_worse_than_unfused(operator, size, dtype):
    torch.manual_seed(size.rows)
    check(operator, size, dtype)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_activations_and_no_bias(operator, activation):
    check(operator, Sizes(), torch.float32, bias=False, activation=activation)
    check(operator, Sizes(), torch.float16, activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("operator", FUSED)
def test_every_tile_of_the_space_and_splits(operator):
    """All tiles agree with the oracle at a size that cuts every block, with one program a row block and with three."""
    functions = backends.operators("triton")
    size = Sizes(rows=19, inner=45, outer=150, rank=40, neurons=150)
    for dtype in (torch.float32, torch.float16):
        tiles = {
            tile for rank in RANK_CLASSES for tile in space(operator, rank, dtype.itemsize, FAMILY)
        }
        for tile in sorted(tiles, key=str):
            tensors = arguments(operator, size, dtype)
            wide = [None if t is None else t.double() for t in tensors]
            unfused, truth = (
                call(operator, tensors, "torch", "gelu"),
                call(operator, wide, "torch", "gelu"),
            )
            for splits in (1,) if operator == "linear_norm" else (1, 3):
                chosen = replace(tile, splits=splits)
                if operator == "qkv":
                    x, rest = tensors[0], tensors[1:]
                    mine = list(functions["qkv"](x, rest[:3], rest[3:6], rest[6:], tile=chosen)[0])
                elif operator == "linear_norm":
                    mine = [functions[operator](*tensors, 1e-5, tile=chosen)[0]]
                else:
                    mine = [functions[operator](*tensors, "gelu", tile=chosen)[0]]
                assert_no_worse(mine, unfused, truth)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    operator=st.sampled_from(FUSED),
    dtype=st.sampled_from(DTYPES),
    size=st.builds(
        Sizes,
        st.integers(0, 40),
        st.integers(1, 90),
        st.integers(1, 90),
        st.integers(1, 140),
        st.integers(1, 90),
    ),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_property_any_size(operator, dtype, size, bias, seed):
    torch.manual_seed(seed)
    check(operator, size, dtype, bias=bias)


# numpy, on which Triton's interpreter computes, warns of what the next two tests are about.
from_numpy = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning:triton")


@from_numpy
@pytest.mark.parametrize("operator", FUSED)
def test_nan_and_inf_flow_as_in_the_reference(operator):
    """A row with NaN or Inf in it comes out as the reference has it, and no other row changes."""
    tensors = arguments(operator, Sizes(rows=20), torch.float32)
    clean = call(operator, tensors, "triton", "relu")
    tensors[0][3, 7], tensors[0][11, 2], tensors[0][12, 0] = torch.nan, torch.inf, -torch.inf
    others = torch.ones(20, dtype=torch.bool)
    others[[3, 11, 12]] = False
    for mine, right, before in zip(
        call(operator, tensors, "triton", "relu"),
        call(operator, tensors, "torch", "relu"),
        clean,
        strict=True,
    ):
        assert torch.equal(mine.isnan(), right.isnan()) and torch.equal(mine.isinf(), right.isinf())
        assert mine.isnan()[3].all()
        assert torch.equal(mine[others], before[others])


def _activation(name: str, z: float) -> float:
    """act(z) by its definition, with its limits at the infinities. No library's activation is asked."""
    if math.isnan(z) or name == "none":
        return z
    if name == "relu" or math.isinf(z):
        return max(z, 0.0)
    if name == "gelu":
        return 0.5 * z * math.erfc(-z / math.sqrt(2))
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@from_numpy
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_activations_of_nan_and_large_values(operator, activation):
    """Through identity factors the kernel's activation meets the special values themselves."""
    special = [math.nan, math.inf, -math.inf, -3e4, -70.0, -50.0, -0.0, 0.0, 50.0, 70.0, 3e4]
    values = special + torch.linspace(-12, 12, 97).tolist()
    x = torch.tensor(values, device=DEVICE)[:, None]
    one = torch.ones(1, 1, device=DEVICE)
    factors = [one, one, None] * (2 if operator == "ffn" else 1)
    mine = call(operator, [x, *factors], "triton", activation)[0]
    right = torch.tensor([_activation(activation, z) for z in values], dtype=torch.float64)
    torch.testing.assert_close(
        mine[:, 0].double().cpu(), right, rtol=1e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_runs_repeat_to_the_bit(operator, dtype):
    tensors = arguments(operator, Sizes(rows=33, outer=150, neurons=200), dtype)
    first, second = call(operator, tensors, "triton"), call(operator, tensors, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranks_beyond_the_kernels_are_served_by_two_matmuls():
    tensors = arguments("linear", Sizes(rank=600), torch.float32)
    torch.testing.assert_close(
        call("linear", tensors, "triton")[0], call("linear", tensors, "torch")[0]
    )
    problem = Problem("linear", 7, 50, 65, 600, torch.float32)
    name, reason = lowrank_kernels.explain_backend(DEVICE, "triton", problem)
    assert name == "torch" and "600" in reason


def test_dense_backend_is_within_the_bound():
    for dtype in (torch.float32, torch.float16):
        tensors = arguments("linear", Sizes(rows=33, inner=90, outer=80, rank=60), dtype)
        mine, right = (
            call("linear", tensors, "dense", "gelu"),
            call("linear", tensors, "torch", "gelu"),
        )
        assert_no_worse(mine, right, call("linear", exact(tensors), "torch", "gelu"))


@pytest.mark.parametrize("operator", FUSED)
def test_autocast(operator):
    """Under autocast every backend computes and returns the lower precision, gradients come back in float32."""
    tensors = arguments(operator, Sizes(), torch.float32)
    low = [None if t is None else t.bfloat16() for t in tensors]
    truth = call(operator, exact(low), "torch")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        unfused, fused = call(operator, tensors, "torch"), call(operator, tensors, "triton")
    assert {y.dtype for y in (*unfused, *fused)} == {torch.bfloat16}
    assert_no_worse(fused, unfused, truth)
    tensors[1].requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        sum(y.float().sum() for y in call(operator, tensors, "triton")).backward()
    assert tensors[1].grad.dtype == torch.float32
