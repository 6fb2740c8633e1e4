"""Time every backend that may serve a problem, and say which is the fastest: for tuning and calibration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from . import measure, tuning
from .backends import FALLBACK, Options, backend_names, bind, get_backend, why_not
from .problem import SENTENCE, Problem

# A rival that differs from two matmuls by more than this part of the largest value is wrong, and no rival.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A backend and its options, as text.
Label = str


class BrokenGpu(RuntimeError):
    """A candidate left the GPU unusable for this process; ``args[0]`` is its label."""


def arguments(problem: Problem, device: torch.device) -> tuple[Tensor, tuple, tuple]:
    """Random arguments of a problem: x, the factors, and what has a row for every row of x."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device, generator=generator) / max(shape[-1], 1) ** 0.5
        return values.to(problem.dtype)

    m, k, n, r, f = problem.rows, problem.inner, problem.outer, problem.rank, problem.hidden
    x = torch.randn(m, k, device=device, generator=generator).to(problem.dtype)
    if problem.operator == "ffn":
        first, second = (normal(r, k), normal(f, r), normal(f)), (normal(r, f), normal(n, r))
        return x, (*first, *second, normal(n), "gelu"), ()
    if problem.operator == "norm":
        return x, (normal(n), normal(n), 1e-12), (normal(m, n),)
    if problem.operator == "attention":
        step = min(m, SENTENCE)
        bounds = torch.arange(0, m + step, step, device=device).clamp_max(m).int()
        key, value = (
            torch.randn(m, width, device=device, generator=generator).to(problem.dtype)
            for width in (k, n)
        )
        return x, (f,), (key, value, bounds, bounds, step, step)
    if problem.operator == "qkv":
        shapes = ((r, k), (n, r), (n,))
        return x, tuple(tuple(normal(*shape) for _ in range(3)) for shape in shapes), ()
    factors = (normal(r, k), normal(n, r), normal(n))
    if problem.operator == "linear_norm":
        return x, (*factors, normal(n), normal(n), 1e-12), (normal(m, n),)
    return x, (*factors, "none"), ()


def candidates(
    problem: Problem, device: torch.device, quick: bool = False
) -> Iterator[tuple[str, Options]]:
    """The backends that may serve a problem here, each with the options it wants timed: all of them, or the likely."""
    for name in backend_names():
        if why_not(name, problem, device, prepared=True) is None:
            backend = get_backend(name)
            chosen = backend.likely if quick and backend.likely else backend.candidates
            for options in chosen(problem, device):
                yield name, options


def compile_ahead(problems: Iterable[Problem], device: torch.device) -> None:
    """Compile what the likely candidates of some problems need, several kernels at a time."""
    by_backend: dict[str, list[tuple[Problem, Options]]] = {}
    for problem in problems:
        for name, options in candidates(problem, device, quick=True):
            by_backend.setdefault(name, []).append((problem, options))
    for name, chosen in by_backend.items():
        ahead = get_backend(name).compile_ahead
        if ahead is None:
            continue
        with ahead():
            for problem, options in chosen:
                x, factors, rest = arguments(problem, device)
                prepared(name, problem, factors, rest, options)(x)


def _results(results: tuple) -> tuple[Tensor, ...]:
    """What an operator computes, without what it keeps for gradients: three tensors for ``qkv``, else one."""
    first = results[0]
    return (first,) if isinstance(first, Tensor) else tuple(first)


def largest_difference(results: tuple, expected: tuple) -> float:
    """The largest difference of any result, relative to its largest value; NaN if one is NaN."""
    differences = [
        (mine.float() - right.float()).abs().max() / right.float().abs().max().clamp_min(1e-30)
        for mine, right in zip(_results(results), _results(expected), strict=True)
    ]
    return torch.stack(differences).max().item()


def prepared(
    backend: str, problem: Problem, factors: tuple, rest: tuple, options: Options
) -> Callable[..., tuple]:
    """A candidate with everything but x in place."""
    function = bind(backend, problem.operator, factors)
    keywords = get_backend(backend).parse_options(options)
    return lambda x: function(x, *rest, **keywords)


def _warn(text: str) -> None:
    print(f"\n{text}", file=sys.stderr)


def fastest(
    problem: Problem,
    device: torch.device,
    budget: float,
    skip: Collection[Label] = (),
    warn: Callable[[str], None] = _warn,
    quick: bool = False,
    begin: Callable[[Label], None] = lambda label: None,
) -> tuning.Entry:
    """Compare all candidates of a problem with two matmuls, time those that agree, and return the winners.

    Args:
        problem, device: what is measured, and where.
        budget: seconds of timing for each candidate, about.
        skip: labels of candidates that are left out.
        warn: takes a line for each candidate that is wrong or fails.
        quick: the likely candidates only.
        begin: takes the label of each candidate before it runs.

    Raises:
        BrokenGpu: a candidate ended in a CUDA error, after which nothing runs in this process.
    """
    x, factors, rest = arguments(problem, device)
    inputs = measure.ring(x, measure.ring_length(x.numel() * x.element_size()))
    right = bind(FALLBACK, problem.operator, factors)(x, *rest)
    best: dict[str, dict[str, tuple[float, Options]]] = {column: {} for column in tuning.COLUMNS}
    for backend, options in candidates(problem, device, quick):
        label = " ".join([backend, *map(str, options.values())])
        if label in skip:
            continue
        begin(label)
        try:
            call = prepared(backend, problem, factors, rest, options)
            if not largest_difference(call(x), right) <= TOLERANCE[problem.dtype]:
                warn(f"{problem}: {label} differs from two matmuls on this GPU and is not used")
                continue
            times = {
                column: measure.milliseconds(call, inputs, budget, captured=column == "captured")[1]
                for column in tuning.COLUMNS
            }
        except Exception as error:
            if "CUDA error" in str(error):
                raise BrokenGpu(label) from error
            # A tile may need more than this GPU has; the others are still worth timing.
            warn(f"{problem}: {label} failed: {error}")
            continue
        for column, time in times.items():
            if backend not in best[column] or time < best[column][backend][0]:
                best[column][backend] = (time, options)
    return tuning.Entry(**{column: _winner(times) for column, times in best.items()})


def _winner(times: dict[str, tuple[float, Options]]) -> tuning.Choice:
    name = min(times, key=lambda backend: times[backend][0])
    return tuning.Choice(
        name, times[name][1], {backend: time for backend, (time, _) in times.items()}
    )
