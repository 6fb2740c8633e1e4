"""What only a GPU can show: capture in a CUDA graph, TF32 by torch's switch, sizes beyond 2**31 for real."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FUSED, Sizes, arguments, assert_no_worse, call, exact

import lowrank_kernels
from lowrank_kernels.backends import get_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BERT = Sizes(rows=257, inner=768, outer=768, rank=245, neurons=3072)


def _usable(backend):
    reason = get_backend(backend).why_not_on(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_real_sizes_and_graph_replay(operator, dtype, backend):
    _usable(backend)
    tensors = arguments(operator, BERT, dtype)
    eager = call(operator, tensors, backend)
    assert_no_worse(
        eager, call(operator, tensors, "torch"), call(operator, exact(tensors), "torch")
    )
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = call(operator, tensors, backend)
    for y in captured:
        y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(mine, right) for mine, right in zip(captured, eager, strict=True))


def test_tf32_follows_the_switch(monkeypatch):
    x, down, up, bias = arguments("linear", BERT, torch.float32)
    truth = lowrank_kernels.lowrank_linear(x.double(), down.double(), up.double(), bias.double())
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        y = lowrank_kernels.lowrank_linear(x, down, up, bias, backend="triton")
        errors.append((y.double() - truth).abs().max().item())
    assert errors[0] < 1e-5 < errors[1] < 1e-2


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_2_to_the_31_elements(backend):
    _usable(backend)
    rows = 2**31 // 768 + 1000
    x = torch.randn(1, 768, device="cuda", dtype=torch.bfloat16).expand(rows, 768).contiguous()
    _, down, up, bias = arguments("linear", BERT, torch.bfloat16)
    y = lowrank_kernels.lowrank_linear(x, down, up, bias, backend=backend)
    assert torch.equal(y[-1], y[0]) and torch.equal(y[rows // 2], y[0])
