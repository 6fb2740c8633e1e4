"""Where operands and results lie in memory changes no result: strides, leading dimensions, offsets, padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FUSED,
    Sizes,
    arguments,
    assert_no_worse,
    call,
    normal,
)

import lowrank_kernels
from lowrank_kernels import backends
from lowrank_kernels.triton_backend import device
from lowrank_kernels.triton_backend.linear import linear_kernel
from lowrank_kernels.triton_backend.tiles import pieces, space

FAMILY = device.facts(DEVICE).family


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
