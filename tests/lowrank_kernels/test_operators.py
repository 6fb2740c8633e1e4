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
    normal,
)

import lowrank_kernels
from lowrank_kernels import backends
from lowrank_kernels.problem import RANK_CLASSES, Problem
from lowrank_kernels.triton_backend import device
from lowrank_kernels.triton_backend.linear import linear_kernel
from lowrank_kernels.triton_backend.tiles import pieces, space

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


def _transposed(t):
    return t.t().contiguous().t()


def _every_other_row(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]


def _every_other_column(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], 2).flatten(1, 2)[:, ::2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "view", [_transposed, _every_other_row, _every_other_column], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("operator", FUSED)
def test_strides_do_not_matter(operator, view):
    tensors = arguments(operator, Sizes(rows=21), torch.float32)
    views = [t if t is None or t.dim() < 2 else view(t) for t in tensors]
    for mine, plain in zip(
        call(operator, views, "triton"), call(operator, tensors, "triton"), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_leading_dimensions(operator, leading):
    count = int(torch.tensor(leading).prod()) if leading else 1
    tensors = arguments(operator, Sizes(rows=count), torch.float32)
    flat = call(operator, tensors, "triton")
    shaped = [
        t.reshape(*leading, t.shape[-1])
        if t is not None and t.dim() == 2 and index in (0, 4 if operator == "linear_norm" else 0)
        else t
        for index, t in enumerate(tensors)
    ]
    for mine, plain in zip(call(operator, shaped, "triton"), flat, strict=True):
        assert mine.shape == (*leading, plain.shape[-1])
        assert torch.equal(mine.reshape(plain.shape), plain)


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


@pytest.mark.parametrize("operator", FUSED)
def test_outputs_are_fully_written(operator, monkeypatch):
    """Memory that the launchers allocate is poisoned with NaN; none is left in any result, saved ones included."""
    real = {
        "new_empty": torch.Tensor.new_empty,
        "empty": torch.empty,
        "empty_like": torch.empty_like,
    }

    def poisoned(name):
        return lambda *args, **kwargs: real[name](*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned("new_empty"))
    monkeypatch.setattr(torch, "empty", poisoned("empty"))
    monkeypatch.setattr(torch, "empty_like", poisoned("empty_like"))
    functions = backends.operators("triton")
    tensors = arguments(operator, Sizes(rows=37, outer=131), torch.float32)
    tile = replace(space(operator, 18, 4, FAMILY)[0], splits=1 if operator == "linear_norm" else 2)
    if operator == "linear":
        results = functions["linear"](*tensors, "gelu", None, True, True, tile=tile)
    elif operator == "linear_norm":
        results = functions["linear_norm"](*tensors, 1e-5, True, True, tile=tile)
    elif operator == "ffn":
        results = functions["ffn"](*tensors, "gelu", True, tile=tile)
    else:
        x, rest = tensors[0], tensors[1:]
        outs, hiddens = functions["qkv"](x, rest[:3], rest[3:6], rest[6:], True, tile=tile)
        results = (*outs, *hiddens)
    for result in results:
        assert not result.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_runs_repeat_to_the_bit(operator, dtype):
    tensors = arguments(operator, Sizes(rows=33, outer=150, neurons=200), dtype)
    first, second = call(operator, tensors, "triton"), call(operator, tensors, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_packed_factors_give_the_same_bits():
    x, down, up, bias = arguments("linear", Sizes(rank=45), torch.float16)
    packed = lowrank_kernels.align_factors(down, up)
    assert packed[0].shape == (48, 50) and packed[1].shape == (65, 48)
    assert (
        torch.equal(packed[0][:45], down)
        and not packed[0][45:].any()
        and not packed[1][:, 45:].any()
    )
    mine = lowrank_kernels.lowrank_linear(x, *packed, bias, backend="triton")
    assert torch.equal(mine, lowrank_kernels.lowrank_linear(x, down, up, bias, backend="triton"))
    assert lowrank_kernels.align_factors(*packed)[0].data_ptr() == packed[0].data_ptr()


@pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.mem_get_info()[1] < 30 * 2**30,
    reason="the buffers need 26 GB, which a GPU has no virtual form of",
)
def test_offsets_beyond_31_bits():
    """Rows 2**30 elements apart: x, residual and both results are reached at offsets above 2**31.

    The buffers are virtual: only the pages that the rows lie on ever exist.
    """
    stride, (k, n, r) = 2**30 + 16, (24, 40, 8)
    down, up = normal(r, k, dtype=torch.float16), normal(n, r, dtype=torch.float16)

    def far(width):
        return torch.empty(2 * stride + width, dtype=torch.float16, device=DEVICE).as_strided(
            (3, width), (stride, 1)
        )

    x, residual, y, hidden, pre = far(k), far(n), far(n), far(r), far(n)
    x.copy_(normal(3, k)), residual.copy_(normal(3, n))
    a, b = pieces(r)
    strides = (stride, *down.stride(), *up.stride(), stride, stride, stride)
    products = {"ACTIVATION": "relu", "PRECISION": "ieee", "UPCAST": False}
    pointers = (x, down, up, None, residual, y, hidden, pre)
    sizes = {"M": 3, "splits": 1, "K": k, "N": n, "R": r, "RP": r}
    names = ("x", "dr", "dk", "un", "ur", "residual", "y", "h")
    sizes |= {f"stride_{name}": value for name, value in zip(names, strides, strict=True)}
    blocks = {"BM": 16, "A": a, "B": b, "BK": 32, "BN": 64, "num_warps": 4, "num_stages": 2}
    linear_kernel[(1,)](*pointers, **sizes, **blocks, **products)
    functions = backends.operators("torch")
    near = [t.clone() for t in (x, residual)]
    right = functions["linear"](near[0], down, up, None, "relu", near[1], True, True)
    truth = functions["linear"](
        near[0].double(), down.double(), up.double(), None, "relu", near[1].double(), True, True
    )
    assert_no_worse([y.clone(), hidden.clone(), pre.clone()], list(right), list(truth))
    for operator in FUSED:
        tensors = arguments(operator, Sizes(rows=3, inner=k, outer=n, rank=r), torch.float16)
        tensors[0] = x
        near = [x.clone(), *tensors[1:]]
        assert all(
            torch.equal(p, q)
            for p, q in zip(
                call(operator, tensors, "triton"), call(operator, near, "triton"), strict=True
            )
        )


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
