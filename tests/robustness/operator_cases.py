"""One random call of an operator: how it is drawn, laid out in memory, made, and held to float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.lowrank_kernels.kernel_cases import FUSED, Sizes, arguments, assert_no_worse, call, exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
BIASES = {"linear": (3,), "linear_norm": (3,), "ffn": (3, 6), "qkv": (7, 8, 9)}
COUNT = {"linear": 4, "linear_norm": 7, "ffn": 7, "qkv": 10}
# In float64 there is no more exact result to compare with; what is compared differs in the order of summation alone.
FLOAT64 = 1e-12
# relu has no derivative at 0 and rounding decides the side: where gradients are wanted, a bias this large keeps away
# from it.
AWAY_FROM_0 = 12.0
LAYOUTS = ("plain", "turned", "gaps", "slice", "rows", "offset", "expanded")


@dataclass(frozen=True)
class Case:
    """One call. ``layouts`` and ``shifts`` go with the arguments, then with the gradients of the results."""

    number: int
    operator: str
    size: Sizes
    dtype: torch.dtype
    leading: tuple[int, ...]
    without: frozenset[int]
    activation: str
    wanted: tuple[int, ...]
    used: tuple[int, ...]
    layouts: tuple[str, ...]
    shifts: tuple[int, ...]
    repeated: bool


def _leading(draw: random.Random, rows: int) -> tuple[int, ...]:
    """Leading dimensions of that many rows: 0 to 3 of them, in 1-d only for one row."""
    count = draw.choice((0, 1, 2, 3) if rows == 1 else (1, 2, 3))
    shape: list[int] = []
    for _ in range(count - 1):
        shape.append(
            draw.choice([d for d in range(1, rows + 1) if rows % d == 0])
            if rows
            else draw.randint(0, 3)
        )
        rows //= max(shape[-1], 1)
    # No rows may come from any of the dimensions.
    return () if count == 0 else (*shape, rows)


def draw_case(seed: int, number: int, largest: int) -> Case:
    """Call ``number`` of a seed; sizes go up to ``largest``, small ones more often than large ones."""
    draw = random.Random(f"{seed}/{number}")
    operator = draw.choice(FUSED)

    def size(least: int = 1) -> int:
        value = max(least, round(largest ** draw.random()))
        return value + -value % 8 if draw.random() < 0.4 else value

    rows = draw.choice((0, 1, size(), size(), size(), size()))
    # The variance of a few numbers can be next to nothing, and then no arithmetic gives their norm.
    sizes = Sizes(rows, size(), size(8 if operator == "linear_norm" else 1), size(), size())
    without = frozenset(index for index in BIASES[operator] if draw.random() < 0.4)
    present = [index for index in range(COUNT[operator]) if index not in without]
    wanted = tuple(i for i in present if draw.random() < 0.5) if draw.random() < 0.6 else ()
    outputs = range(3 if operator == "qkv" else 1)
    used = tuple(outputs) if draw.random() < 0.8 else (draw.choice(outputs),)
    activation = draw.choice(ACTIVATIONS)
    if wanted and activation == "relu":
        without -= {3}
    layouts = tuple(
        draw.choice(LAYOUTS) if draw.random() < 0.6 else "plain" for _ in range(COUNT[operator] + 3)
    )
    return Case(
        number,
        operator,
        sizes,
        draw.choice(DTYPES),
        _leading(draw, rows),
        without,
        activation,
        wanted,
        used,
        layouts,
        tuple(draw.randint(1, 7) for _ in layouts),
        draw.random() < 0.1,
    )


def laid_out(value: Tensor, layout: str, shift: int) -> tuple[Tensor, Tensor]:
    """The memory and a view in it of the shape of ``value``; what the view leaves out is NaN.

    ``expanded`` repeats the first entry along the first dimension; the others keep the values.
    """
    shape, width = value.shape, value.shape[-1]
    if layout == "turned":
        base = value.movedim(-1, 0).contiguous()
        return base, base.movedim(0, -1)
    if layout == "expanded":
        base = value[:1].clone()
        return base, base.expand(shape)
    if layout == "gaps":
        base = value.new_full((*shape, 2), math.nan)
        view = base[..., shift % 2]
    elif layout == "rows":
        base = value.new_full((shape[0], 1 + shift, *shape[1:]), math.nan)
        view = base[:, shift]
    elif layout == "slice":
        base = value.new_full((*shape[:-1], width + shift + 1), math.nan)
        view = base[..., shift : shift + width]
    else:
        base = value.new_full((value.numel() + (shift if layout == "offset" else 0),), math.nan)
        view = base[base.numel() - value.numel() :].view(shape)
    return base, view.copy_(value)


def _run(
    case: Case, tensors: list[Tensor | None], weights: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of one call and the wanted gradients of the used ones: zeros where no used result depends on it."""
    leaves = [
        t if t is None else t.detach().requires_grad_(index in case.wanted)
        for index, t in enumerate(tensors)
    ]
    outputs = call(case.operator, leaves, backend, case.activation)
    inputs = [leaves[index] for index in case.wanted]
    roots = [
        (outputs[index], weights[index]) for index in case.used if outputs[index].requires_grad
    ]
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if inputs and roots:
        found = torch.autograd.grad(
            [y for y, _ in roots], inputs, [w for _, w in roots], allow_unused=True
        )
    return [y.detach() for y in outputs], [
        torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)
    ]


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(
        left.nan_to_num(), right.nan_to_num()
    )


def check_case(case: Case, seed: int, backend: str, device: torch.device) -> None:
    """Make the call and hold it to float64.

    The ``dense`` backend rounds the product of the factors, which the unfused form does not: in 16 bits the bound is
    stated for its results and not for its gradients.

    Raises:
        AssertionError: a result or gradient is off, an input was written to, or a second call differs.
    """
    if backend == "dense" and case.dtype.itemsize == 2:
        case = replace(case, wanted=())
    torch.manual_seed(seed * 1_000_003 + case.number)
    rowwise = (0, 4) if case.operator == "linear_norm" else (0,)
    drawn = [
        None if i in case.without else t.to(device)
        for i, t in enumerate(arguments(case.operator, case.size, case.dtype))
    ]
    if case.wanted and case.activation == "relu" and case.operator in ("linear", "ffn"):
        drawn[3] = drawn[3] + AWAY_FROM_0 * drawn[3].sign()
    shaped = [
        t.reshape(*case.leading, t.shape[-1]) if i in rowwise else t for i, t in enumerate(drawn)
    ]
    # One for each input, then one for each weight of a result.
    styles = list(zip(case.layouts, case.shifts, strict=True))
    memory = [
        None if t is None else laid_out(t, *style) for t, style in zip(shaped, styles, strict=False)
    ]
    tensors = [None if pair is None else pair[1] for pair in memory]
    flat = [
        t.reshape(case.size.rows, t.shape[-1])
        if i in rowwise
        else None
        if t is None
        else t.contiguous()
        for i, t in enumerate(tensors)
    ]
    widths = [
        t.shape[0]
        for t in (
            flat[4:7] if case.operator == "qkv" else [flat[5 if case.operator == "ffn" else 2]]
        )
    ]
    weights = [
        laid_out(
            torch.randn(*case.leading, n, dtype=torch.float64).to(case.dtype).to(device), *style
        )[1]
        for n, style in zip(widths, styles[len(drawn) :], strict=False)
    ]
    before = [None if pair is None else pair[0].clone() for pair in memory]

    outputs, gradients = _run(case, tensors, weights, backend)
    for old, pair in zip(before, memory, strict=True):
        assert pair is None or _same(old, pair[0]), "an input was written to"
    if case.repeated:
        second = _run(case, tensors, weights, backend)
        assert all(
            _same(a, b)
            for a, b in zip((*outputs, *gradients), (*second[0], *second[1]), strict=True)
        ), "a second call differs"

    assert all(y.shape == (*case.leading, n) for y, n in zip(outputs, widths, strict=True)), (
        "a result has the wrong shape"
    )
    wide = [
        w.reshape(case.size.rows, -1) if case.size.rows else w.new_zeros(0, n)
        for w, n in zip(weights, widths, strict=True)
    ]
    unfused = _run(case, flat, wide, "torch")
    truth = _run(case, exact(flat), [w.double() for w in wide], "torch")
    for mine, other, right in zip((outputs, gradients), unfused, truth, strict=True):
        mine = [t.reshape(r.shape) for t, r in zip(mine, right, strict=True)]
        if case.dtype == torch.float64:
            for t, r in zip(mine, right, strict=True):
                largest = r.abs().max().item() if r.numel() else 0.0
                torch.testing.assert_close(t, r, rtol=0, atol=FLOAT64 * max(1.0, largest))
        else:
            assert_no_worse(mine, other, right)
