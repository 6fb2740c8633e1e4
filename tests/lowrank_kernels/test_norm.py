"""``norm``, the sum and LayerNorm of the runtime: Triton against float64 and the library."""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import DEVICE, assert_no_worse, normal, rows

from lowrank_kernels import backends, inference, use_backend
from lowrank_kernels.problem import Problem

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton needs a GPU or its interpreter",
)


def tensors(count: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        *(rows(count, width, dtype=dtype) for _ in range(2)),
        *(rows(1, width, dtype=dtype)[0] for _ in range(2)),
    ]


def call(backend: str, given: list[torch.Tensor], eps: float = 1e-12) -> list[torch.Tensor]:
    x, residual, weight, shift = given
    return [backends.bind(backend, "norm", (weight, shift, eps))(x, residual)[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (7, 50), (3, 768), (5, 1000)])
def test_norm_errs_no_more_than_the_library(count, width, dtype):
    given = tensors(count, width, dtype)
    exact = call("torch", [t.double() for t in given])
    assert_no_worse(call("triton", given), call("torch", given), exact)


def test_rows_that_lie_apart_and_an_offset_that_is_large():
    """Views of wider tensors, and a mean a thousand times the spread, which a sum of squares would lose."""
    wide = [rows(6, 96), rows(6, 80) + 1000.0]
    given = [wide[0][:, 5:69], wide[1][:, 3:67], *tensors(1, 64, torch.float32)[2:]]
    assert not given[0].is_contiguous() and not given[1].is_contiguous()
    exact = call("torch", [t.double() for t in given])
    assert_no_worse(call("triton", given), call("torch", given), exact)


def test_inf_and_nan_stay_in_their_row():
    given = tensors(4, 33, torch.float32)
    given[0][1, 3], given[1][2, 7] = torch.inf, torch.nan
    (mine,), (other,) = call("triton", given), call("torch", given)
    assert torch.equal(mine.isnan(), other.isnan()) and not mine[0].isnan().any()


def test_nothing_to_do():
    assert call("triton", tensors(0, 8, torch.float32))[0].shape == (0, 8)


def test_what_is_too_wide_is_left_to_the_library():
    problem = Problem("norm", 2, 8200, 8200, 0, torch.float32)
    assert "8200" in backends.why_not("triton", problem, DEVICE)
    norm = inference.prepare_norm(normal(1, 8200)[0], normal(1, 8200)[0])
    with use_backend("triton"):
        assert norm(rows(2, 8200), rows(2, 8200)) is None
