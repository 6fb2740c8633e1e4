"""The operators under test in one form: random arguments, a call by backend, and the comparison with float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lowrank_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Added to twice the unfused error, for results of size 1: one unit in the last place in 16 bits; in float32, where
# only the order of summation differs, half a unit times the square root of 512 terms, as a random walk grows.
EPSILON = {torch.float32: 2.0**-24 * 512**0.5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FUSED = ("linear", "linear_norm", "qkv", "ffn")


@dataclass(frozen=True)
class Sizes:
    """Rows, in_features, out_features, rank, neurons."""

    rows: int = 7
    inner: int = 50
    outer: int = 65
    rank: int = 13
    neurons: int = 70


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values scaled so that the results of every operator are of size 1."""
    return (
        (torch.randn(*shape, dtype=torch.float64) / max(shape[-1], 1) ** 0.5).to(dtype).to(DEVICE)
    )


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def arguments(
    operator: str, size: Sizes, dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor | None]:
    """The tensor arguments of an operator in the order of its call, freshly drawn."""
    m, k, n, r, f = size.rows, size.inner, size.outer, size.rank, size.neurons

    def vector(width: int) -> Tensor | None:
        return normal(1, width, dtype=dtype)[0] if bias else None

    pair = [normal(r, k, dtype=dtype), normal(n, r, dtype=dtype)]
    x = rows(m, k, dtype=dtype)
    if operator == "linear":
        return [x, *pair, vector(n)]
    if operator == "linear_norm":
        return [
            x,
            *pair,
            vector(n),
            rows(m, n, dtype=dtype),
            rows(1, n, dtype=dtype)[0],
            rows(1, n, dtype=dtype)[0],
        ]
    if operator == "ffn":
        second = max(r - 4, 1)
        return [
            x,
            normal(r, k, dtype=dtype),
            normal(f, r, dtype=dtype),
            vector(f),
            normal(second, f, dtype=dtype),
            normal(n, second, dtype=dtype),
            vector(n),
        ]
    ranks = (r, max(r // 3, 1), r + 5)
    return [
        x,
        *(normal(rank, k, dtype=dtype) for rank in ranks),
        *(normal(n + index, rank, dtype=dtype) for index, rank in enumerate(ranks)),
        *(vector(n + index) for index in range(3)),
    ]


def call(
    operator: str, tensors: list[Tensor | None], backend: str | None, activation: str | None = None
) -> list[Tensor]:
    """Call an operator on its tensors, results as a list."""
    if operator == "linear":
        return [lowrank_kernels.lowrank_linear(*tensors, activation=activation, backend=backend)]
    if operator == "linear_norm":
        return [lowrank_kernels.lowrank_linear_norm(*tensors, eps=1e-5, backend=backend)]
    if operator == "ffn":
        return [
            lowrank_kernels.lowrank_ffn(*tensors, activation=activation or "gelu", backend=backend)
        ]
    x, rest = tensors[0], tensors[1:]
    return list(lowrank_kernels.lowrank_qkv(x, rest[:3], rest[3:6], rest[6:], backend=backend))


def gradients(
    operator: str,
    tensors: list[Tensor | None],
    backend: str,
    wanted: list[int],
    activation: str | None = None,
) -> list[Tensor]:
    """Gradients of a fixed random weighting of the results for the arguments numbered in ``wanted``."""
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    for index in wanted:
        leaves[index].requires_grad_()
    outputs = call(operator, leaves, backend, activation)
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs
    ]
    return list(torch.autograd.grad(outputs, [leaves[index] for index in wanted], weights))


def exact(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same arguments in float64."""
    return [None if t is None else t.double() for t in tensors]


def assert_no_worse(fused: list[Tensor], unfused: list[Tensor], truth: list[Tensor]) -> None:
    """Against float64 the fused result errs at most twice as much as the unfused one of the same dtype, plus epsilon.

    The epsilon is relative to the size of the result, since gradients are larger than 1.
    """
    assert len(fused) == len(unfused) == len(truth)
    for mine, other, right in zip(fused, unfused, truth, strict=True):
        assert mine.shape == right.shape and mine.dtype == other.dtype
        if right.numel() == 0:
            continue
        error = (mine.double() - right).abs().max().item()
        allowed = 2 * (other.double() - right).abs().max().item()
        allowed += EPSILON[mine.dtype] * max(1.0, right.abs().max().item())
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check(
    operator: str,
    size: Sizes,
    dtype: torch.dtype,
    backend: str = "triton",
    bias: bool = True,
    activation: str | None = None,
) -> None:
    """Draw arguments, run the backend, and hold it to the bound."""
    tensors = arguments(operator, size, dtype, bias)
    assert_no_worse(
        call(operator, tensors, backend, activation),
        call(operator, tensors, "torch", activation),
        call(operator, exact(tensors), "torch", activation),
    )
