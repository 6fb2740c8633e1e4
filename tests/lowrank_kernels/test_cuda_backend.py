"""The cuda backend's Python: where it declines and why, and that its launchers hand the kernels what they need.

The launchers run against a stand-in for the compiled module that computes on the addresses it is given, in CPU memory.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Sizes, assert_no_worse, exact

from lowrank_kernels import activations, backends, dispatch
from lowrank_kernels.cuda_backend import build, launch, support
from lowrank_kernels.cuda_backend.ffn import ffn
from lowrank_kernels.cuda_backend.linear import linear
from lowrank_kernels.problem import Problem
from lowrank_kernels.reference.ffn import ffn as reference_ffn
from lowrank_kernels.reference.linear import linear_saving


class StandIn:
    """Checks what launch.cpp checks and computes what the kernels compute, on the addresses themselves."""

    archs = ("80", "90a")

    def __init__(self) -> None:
        self.calls = 0

    def devices(self):
        return 0, "no device: stand-in"

    def matrix(self, described):
        address, rows, columns, stride = described
        assert address % 16 == 0 and stride % 8 == 0 and columns % 8 == 0 and stride >= columns
        raw = (ctypes.c_int16 * (stride * (rows - 1) + columns)).from_address(address)
        flat = torch.from_numpy(np.frombuffer(raw, np.int16)).view(torch.float16)
        return flat.as_strided((rows, columns), (stride, 1))

    def vector(self, address, length):
        assert address % 4 == 0
        if address == 0:
            return None
        raw = (ctypes.c_int16 * length).from_address(address)
        return torch.from_numpy(np.frombuffer(raw, np.int16)).view(torch.float16)

    def linear(
        self,
        x,
        down,
        up,
        bias,
        y,
        hidden,
        rank,
        dtype,
        activation,
        device,
        stream,
        rows,
        cluster,
        weights,
    ):
        self.calls += 1
        name = activations.NAMES[activation]
        assert dtype == 1 and rank <= down[1] and down[1] % 16 == 0
        h = F.linear(self.matrix(x), self.matrix(down))
        if hidden[0]:
            self.matrix(hidden).copy_(h)
        out = F.linear(h, self.matrix(up), self.vector(bias, up[1]))
        self.matrix(y).copy_(activations.apply(name, out))
        return 0, ""

    def ffn(
        self, x, down1, up1, bias1, down2, up2, bias2, y, p, q, rank1, rank2, dtype, activation, *_
    ):
        self.calls += 1
        a = [self.matrix(m) for m in (x, down1, up1)], self.vector(bias1, up1[1])
        b = [self.matrix(m) for m in (down2, up2)], self.vector(bias2, up2[1])
        name = activations.NAMES[activation]
        out, found_p, found_q = reference_ffn(*a[0], a[1], *b[0], b[1], name, True)
        self.matrix(y).copy_(out)
        if p[0]:
            self.matrix(p).copy_(found_p), self.matrix(q).copy_(found_q)
        return 0, ""


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setattr(build, "module", lambda: module)
    monkeypatch.setattr(launch, "stream_of", lambda x: (0, 0))
    return module


def _cpu(*shape):
    return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).half()


def _strided(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], 2).flatten(1, 2)[:, ::2]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("save_pre", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "view",
    [lambda t: t, _strided, lambda t: t.t().contiguous().t()],
    ids=["plain", "strided", "turned"],
)
def test_linear_launcher(stand_in, view, activation, save_pre, residual):
    """Any strides, ranks that are no multiple of 8, residual, both saved results."""
    x, down, up, bias = _cpu(7, 24), _cpu(13, 24), _cpu(40, 13), _cpu(1, 41)[0, 1:]
    more = _cpu(7, 40) if residual else None
    args = [view(x), view(down), view(up), bias]
    mine = linear(*args, activation, more, True, save_pre)
    right = linear_saving(*args, activation, more, True, save_pre)
    truth = linear_saving(
        *exact(args), activation, None if more is None else more.double(), True, save_pre
    )
    assert stand_in.calls == 1 and mine[1].shape == (7, 13) and (mine[2] is not None) == save_pre
    kept = [index for index in range(3) if mine[index] is not None]
    assert_no_worse(*([result[index] for index in kept] for result in (mine, right, truth)))
    if save_pre:
        assert mine[0].data_ptr() != mine[2].data_ptr()


@pytest.mark.parametrize("save", [False, True])
def test_ffn_launcher(stand_in, save):
    size = Sizes(rows=5, inner=24, outer=40, rank=13, neurons=48)
    args = [
        _cpu(size.rows, size.inner),
        _cpu(13, 24),
        _cpu(48, 13),
        _cpu(1, 48)[0],
        _cpu(9, 48),
        _cpu(40, 9),
        None,
    ]
    mine, right, truth = (
        function(*arguments, "relu", save)
        for function, arguments in (
            (ffn, args),
            (reference_ffn, args),
            (reference_ffn, exact(args)),
        )
    )
    assert stand_in.calls == 1 and (mine[1] is not None) == save
    assert_no_worse(*([r for r in results if r is not None] for results in (mine, right, truth)))


def test_prepared_factors_are_laid_out_once_and_outlive_their_names(stand_in, monkeypatch):
    """Bound to factors of rank 13 that lie turned, both operators compute what a plain call does, without a copy."""
    pair = [_cpu(13, 24), _cpu(40, 13).t().contiguous().t()]
    second = [_cpu(9, 40), _cpu(24, 9)]
    x, bias = _cpu(7, 24), _cpu(1, 40)[0]
    expected = linear(x, *pair, bias, "gelu")[0], ffn(x, *pair, bias, *second, None, "relu")[0]
    calls = [
        backends.bind("cuda", "linear", (*pair, bias, "gelu")),
        backends.bind("cuda", "ffn", (*pair, bias, *second, None, "relu")),
    ]
    del pair[:], second[:], bias
    monkeypatch.setattr(launch, "factors", None)
    for call, right in zip(calls, expected, strict=True):
        for count in (7, 3, 0):
            assert torch.equal(call(x[:count])[0], right[:count])
    assert torch.equal(calls[0](x, rows=64, cluster=2, weights=True)[0], expected[0])
    assert torch.equal(calls[1](x, cluster=4)[0], expected[1])


def test_no_rows_launch_nothing(stand_in):
    y, hidden, pre = linear(_cpu(0, 24), _cpu(13, 24), _cpu(40, 13), None, "gelu", None, True, True)
    assert (
        y.shape == (0, 40)
        and hidden.shape == (0, 13)
        and pre.shape == (0, 40)
        and stand_in.calls == 0
    )


@pytest.mark.parametrize("code, error", [(1, ValueError), (2, RuntimeError)])
def test_refusals_become_errors_of_one_line(stand_in, code, error):
    stand_in.linear = lambda *_: (code, "x has shape (1, 2); it needs (3, 4)")
    with pytest.raises(error, match=r"^linear: x has shape \(1, 2\); it needs \(3, 4\)$"):
        linear(_cpu(1, 8), _cpu(8, 8), _cpu(8, 8), None, "none")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"inner": 50}, "in_features 50 is not a multiple of 8"),
        ({"outer": 65}, "out_features 65 is not a multiple of 8"),
        ({"rank": 513}, "rank 513 is above 512"),
        ({"operator": "ffn", "hidden": 70}, "neurons 70 is not a multiple of 8"),
        ({"operator": "ffn", "hidden": 64, "rank": 300}, "rank 300 is above 256"),
    ],
    ids=str,
)
def test_what_it_declines(change, reason, monkeypatch):
    monkeypatch.setattr(support, "capability", lambda device: 9)
    problem = Problem("linear", 5, 48, 64, 245, torch.bfloat16)._replace(**change)
    found = support.why_not_for(problem, torch.device("cuda"))
    assert found is None if reason is None else reason in found
    if change.get("operator") == "ffn":
        monkeypatch.setattr(support, "capability", lambda device: 8)
        assert (
            support.why_not_for(problem._replace(hidden=64, rank=100), torch.device("cuda"))
            is not None
        )


def test_it_is_registered_and_never_the_default(stand_in):
    backend = backends.get_backend("cuda")
    assert set(backend.load()) == {"linear", "ffn"}
    cpu = torch.device("cpu")
    assert backend.why_not_on(cpu) == "no device: stand-in"
    problem = Problem("linear", 1, 8, 8, 8, torch.float16)
    with pytest.raises(ValueError, match="backend is 'cuda', but no device"):
        dispatch.choose("cuda", problem, cpu)
    assert dispatch.choose("auto", problem, cpu) == ("torch", {})
