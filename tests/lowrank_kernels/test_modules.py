"""``LowRankLinear`` is a drop-in for nn.Linear, and its runtime form never shows in what is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import DEVICE
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.func import functional_call

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
    with pytest.raises(TypeError, match=r"it needs torch.float64, the dtype of x"):
        layer(torch.ones(2, 12, dtype=torch.float64, device=DEVICE))


def _right(layer, x):
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.down.T @ layer.up.T + layer.bias)


def test_every_change_of_the_parameters_is_seen():
    """Changed in place, behind autograd's back, replaced by memory that was in use before, or put in for one call."""
    layer = LowRankLinear(40, 30, 13, device=DEVICE)
    layer.backend = "triton"
    x = torch.randn(5, 40, device=DEVICE)
    _right(layer, x)
    with torch.no_grad():
        layer.up.mul_(2)
    _right(layer, x)
    layer.up.data.mul_(2)
    _right(layer, x)
    for _ in range(4):
        layer.up.data = torch.randn_like(layer.up)
        layer.up.data = torch.randn_like(layer.up)
        _right(layer, x)
        with torch.no_grad():
            once = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
            y = functional_call(layer, once, (x,))
            torch.testing.assert_close(y, x @ once["down"].T @ once["up"].T + once["bias"])
            del once


def test_copies_are_independent_and_replicas_share():
    """A deep copy has parameters of its own; a replica, as nn.DataParallel makes them, differs in its tensors alone."""
    layer = LowRankLinear(40, 30, 13, device=DEVICE)
    layer.backend = "triton"
    x = torch.randn(5, 40, device=DEVICE)
    twin, replica = copy.deepcopy(layer), layer._replicate_for_data_parallel()
    # What replicate() does next: the parameters become plain tensors that autograd leads back to the original.
    for name, value in layer.named_parameters():
        setattr(replica, name, value.clone())
    assert twin.backend == replica.backend == "triton"
    assert torch.equal(twin(x), layer(x)) and torch.equal(replica(x), layer(x))
    replica(x).sum().backward()
    assert layer.down.grad.shape == (13, 40) and twin.down.grad is None
    with torch.no_grad():
        twin.down.zero_()
        twin.bias.zero_()
    assert not twin(x).any() and layer(x).any()


def test_saved_by_safetensors_and_read_back_to_the_bit(tmp_path):
    layer = LowRankLinear(40, 30, 13, device=DEVICE)
    layer.backend = "triton"
    x = torch.randn(5, 40, device=DEVICE)
    y = layer(x)
    save_model(layer, tmp_path / "layer.safetensors")
    assert {
        name: tuple(value.shape)
        for name, value in load_file(tmp_path / "layer.safetensors").items()
    } == {"down": (13, 40), "up": (30, 13), "bias": (30,)}
    other = LowRankLinear(40, 30, 13, device=DEVICE)
    load_model(other, tmp_path / "layer.safetensors", device=str(DEVICE))
    other.backend = "triton"
    assert torch.equal(other(x), y)
