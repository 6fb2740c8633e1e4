"""What a wrong call of an operator is told: the argument, what it has and what it needs."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import DEVICE, FUSED, Sizes, arguments, call

import lowrank_kernels


def _drop(tensors, index, value):
    return [value if position == index else t for position, t in enumerate(tensors)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("operator", "index", "wrong", "message"),
    [
        ("linear", 0, (7, 49), "x has shape (7, 49); it needs (..., 50)"),
        ("linear", 0, (), "x has shape (); it needs (..., 50)"),
        ("linear", 1, (13,), "down has shape (13,); it needs 2 dimensions"),
        ("linear", 1, (0, 50), "up has shape (65, 13); it needs (out_features, 0)"),
        ("linear", 2, (65, 12), "up has shape (65, 12); it needs (out_features, 13)"),
        ("linear", 3, (1,), "bias has shape (1,); it needs (65,)"),
        ("linear_norm", 4, (6, 65), "residual has shape (6, 65); it needs (7, 65)"),
        ("linear_norm", 5, (64,), "norm_weight has shape (64,); it needs (65,)"),
        ("ffn", 4, (9, 69), "down2 has shape (9, 69); it needs (rank of at least 1, 70)"),
        ("ffn", 5, (65, 8), "up2 has shape (65, 8); it needs (out_features, 9)"),
        ("ffn", 6, (64,), "bias2 has shape (64,); it needs (65,)"),
        ("qkv", 2, (4, 51), "x has shape (7, 50); it needs (..., 51) to enter down[1]"),
        ("qkv", 9, (1,), "bias[2] has shape (1,); it needs (67,)"),
    ],
)
def test_wrong_shapes_are_named(operator, index, wrong, message, backend):
    tensors = _drop(arguments(operator, Sizes()), index, torch.ones(wrong, device=DEVICE))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(operator, tensors, backend)


@pytest.mark.parametrize("operator", FUSED)
def test_wrong_dtypes_and_devices_are_named(operator):
    tensors = arguments(operator, Sizes())
    with pytest.raises(TypeError, match=r"has dtype torch.float16; it needs torch.float32"):
        call(operator, _drop(tensors, 2, tensors[2].half()), None)
    with pytest.raises(ValueError, match="is on meta; it needs"):
        call(operator, _drop(tensors, 2, tensors[2].to("meta")), None)
    with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
        call(operator, [None if t is None else t.long() for t in tensors], None)


def test_wrong_activation_is_named():
    with pytest.raises(
        ValueError, match="activation is 'swish'; it must be None or one of none, gelu"
    ):
        call("linear", arguments("linear", Sizes()), None, "swish")
    with pytest.raises(ValueError, match="downs has 2 entries; it needs 3"):
        lowrank_kernels.lowrank_qkv(
            torch.ones(1, 2), [torch.ones(1, 2)] * 2, [torch.ones(1, 1)] * 3
        )
