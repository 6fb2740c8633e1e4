"""``LowRankLinear`` is a drop-in for nn.Linear, and its runtime form never shows in what is saved."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from kernel_cases import DEVICE
from torch import nn

from lowrank_kernels import LowRankLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (1, 9)], ids=str)
def test_full_rank_equals_dense(shape, bias):
    dense = nn.Linear(*shape, bias=bias).double()
    layer = LowRankLinear.from_linear(dense, min(shape))
    x = torch.randn(4, 3, shape[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer(x).shape == dense(x).shape and (layer.bias is None) == (dense.bias is None)


def test_truncation_loses_the_dropped_singular_values_and_is_balanced():
    dense = nn.Linear(40, 30).double()
    layer = LowRankLinear.from_linear(dense, 11)
    lost = (dense.weight - layer.up @ layer.down).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(dense.weight)[11:].square().sum())
    torch.testing.assert_close(layer.down @ layer.down.T, layer.up.T @ layer.up)


def test_keeps_what_the_dense_layer_had():
    dense = nn.Linear(12, 10, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    layer = LowRankLinear.from_linear(dense, 4)
    assert layer.down.dtype == torch.bfloat16 and not layer.training
    assert not layer.down.requires_grad and not layer.up.requires_grad and layer.bias.requires_grad
    assert torch.equal(layer.bias, dense.bias) and layer.bias.data_ptr() != dense.bias.data_ptr()
    assert "rank=4" in repr(layer) and f"parameters={4 * 22 + 10}" in repr(layer)


def test_initial_weights_have_the_variance_of_nn_linear():
    layer = LowRankLinear(300, 400, 50)
    torch.testing.assert_close((layer.up @ layer.down).var().item(), 1 / 900, rtol=0.1, atol=0)


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_wrong_ranks_are_named(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}; a \\(10, 12\\) weight needs 1 to 10"):
        LowRankLinear.from_linear(nn.Linear(12, 10), rank)
    if rank < 1:
        with pytest.raises(ValueError, match=f"rank is {rank}; it must be at least 1"):
            LowRankLinear(12, 10, rank)


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_wrong_input_is_named(backend):
    layer = LowRankLinear(12, 10, 3, device=DEVICE)
    layer.backend = backend
    with pytest.raises(ValueError, match=r"x has shape \(2, 11\); it needs \(..., 12\)"):
        layer(torch.ones(2, 11, device=DEVICE))
    with pytest.raises(TypeError, match="it needs torch.float64, the dtype of x"):
        layer(torch.ones(2, 12, dtype=torch.float64, device=DEVICE))


def test_packed_form_follows_the_parameters_and_is_never_saved():
    layer = LowRankLinear(40, 30, 13, device=DEVICE)
    layer.backend = "triton"
    x = torch.randn(5, 40, device=DEVICE)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer(x)
        first = layer.packed()
        assert first[0].shape == (16, 40) and layer.packed() is first
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
            "down": (13, 40), "up": (30, 13), "bias": (30,)
        }
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        layer.up.mul_(2)
        layer.bias.zero_()
        torch.testing.assert_close(layer(x), x @ layer.down.T @ layer.up.T)
        twin = copy.deepcopy(layer)
        assert twin._packed is None
        twin.down.zero_()
        assert not twin(x).any() and layer(x).any()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert buffer.tell() < 4 * (13 * 70 + 30) + 4096
    layer(x).sum().backward()
    assert layer.down.grad.shape == (13, 40)
