"""Which backend runs a call: the argument, else the override, else a measured table, else two matmuls.

Order of precedence:
1. the argument ``backend=`` of the call or the attribute of the module;
2. ``use_backend(...)`` in force, or the environment variable ``LOWRANK_KERNELS_BACKEND`` read at import;
3. on a GPU, what was measured on that GPU: by the calibration of ``fuse_``, or by ``python -m lowrank_kernels.tune``;
4. ``torch``: two library matmuls. A fused kernel is never the default where nobody has measured that it is faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .backends import FALLBACK, Backend, Options, get_backend, has_operator, operators, why_not
from .problem import Problem

ENVIRONMENT = "LOWRANK_KERNELS_BACKEND"

# Counts the changes of what decides (overrides, tables) and of factors in place: what was chosen or made under another
# number is void.
generation = 0
_environment: str | None = os.environ.get(ENVIRONMENT) or None
_forced: str | None = _environment
_blocks: list[list[str | None]] = []
_lock = threading.Lock()
_nothing = contextlib.nullcontext()
_as_captured = False


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the calls inside the block on backend ``name`` unless they name their own; None means the automatic choice.

    It holds for all threads: of the blocks that are open at a time, the one entered last counts.

    >>> with use_backend("torch"):
    ...     explain_backend("cpu")
    ('torch', 'asked for by use_backend or LOWRANK_KERNELS_BACKEND')

    Raises:
        ValueError: no backend has that name.
    """
    global _forced, generation
    if name is not None and name != "auto":
        get_backend(name)
    block = [None if name == "auto" else name]
    with _lock:
        _blocks.append(block)
        _forced = block[0]
        generation += 1
    try:
        yield
    finally:
        with _lock:
            # Threads may leave in another order than they came in.
            _blocks[:] = [other for other in _blocks if other is not block]
            _forced = _blocks[-1][0] if _blocks else _environment
            generation += 1


def override() -> str:
    """The backend that ``use_backend`` or the environment asks for, or "auto"."""
    return _forced or "auto"


def void_plans() -> None:
    """Have everything prepared made again at its next call; to be called after factors were changed in place."""
    global generation
    with _lock:
        generation += 1


def refresh() -> None:
    """Read the tables again; called after they were written."""
    _device_table.cache_clear()
    void_plans()


@cache
def _device_table(index: int | None) -> tuning.Table | None:
    """What was measured on a GPU; asks the driver only if anything was measured on any."""
    return tuning.load(tuning.gpu(index)) if tuning.any_tables() else None


def _has_table(index: int | None) -> bool:
    """Whether a table decides on a GPU; a compiled graph keeps the answer of its tracing."""
    return _device_table(index) is not None


# What torch.compiler.assume_constant_result does, without its import of the compiler.
vars(_has_table)["_dynamo_marked_constant"] = True


def capturing(device: torch.device) -> bool:
    """Whether a call on ``device`` becomes part of a CUDA graph, where the host's time does not count."""
    return device.type == "cuda" and (_as_captured or in_capture(device))


def in_capture(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Choose inside the block as in a CUDA graph: to compile and load, before a capture, what it will hold."""
    global _as_captured
    _as_captured = True
    try:
        yield
    finally:
        _as_captured = False


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current GPU, which launches go to, wherever the tensors are."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _nothing


def route(x: Tensor, backend: str | None) -> str:
    """The backend of one call as far as it can be told without its shapes: a name, or "auto" where a table decides.

    Kept free of shapes so that ``torch.compile`` does not specialise on the batch size. Where no table decides, a
    compiled graph holds plain matmuls, which the compiler can fuse with what is around them.
    """
    if backend is None or backend == "auto":
        backend = _forced
        if backend is None:
            return "auto" if x.is_cuda and _has_table(x.device.index) else FALLBACK
    return backend


def settle(
    backend: str | None, x: Tensor, operator: str, outer: int, rank: int, hidden: int = 0
) -> str:
    """``route``, and in eager mode also what the table says of this call, so that two matmuls are called as such."""
    name = route(x, backend)
    if name != "auto" or torch.compiler.is_compiling():
        return name
    inner, dtype = x.shape[-1], x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    problem = Problem(operator, x.numel() // max(inner, 1), inner, outer, rank, dtype, hidden)
    return choose(name, problem, x.device, capturing(x.device))[0]


@cache
def _check_device(chosen: Backend, device: torch.device) -> None:
    """Ask a backend once whether it can run on ``device``.

    Raises:
        ValueError: it cannot.
    """
    reason = chosen.why_not_on(device)
    if reason is not None:
        raise ValueError(f"backend is {chosen.name!r}, but {reason}")


def choose(
    backend: str,
    problem: Problem,
    device: torch.device,
    captured: bool = False,
    prepared: bool = False,
) -> tuple[str, Options]:
    """The backend that serves a problem, and the options that were measured for it (or none).

    A backend that lacks the operator or does not serve the problem gives way to two matmuls.

    Args:
        backend: a name, or "auto".
        captured: whether the call becomes part of a CUDA graph; eager calls have a column of their own in the tables.
        prepared: whether the factors are prepared once (see ``inference``).

    Raises:
        ValueError: the backend is unknown or cannot run on ``device``.
    """
    table = _device_table(device.index) if device.type == "cuda" else None
    entry = table.find(problem) if table is not None else None
    choice = None if entry is None else entry.captured if captured else entry.eager
    if backend == "auto":
        backend = choice.backend if choice is not None else FALLBACK
        if get_backend(backend).prepared_only and not prepared:
            return FALLBACK, {}
    chosen = get_backend(backend)
    _check_device(chosen, device)
    if not has_operator(backend, problem.operator, prepared) or chosen.why_not_for(problem, device):
        return FALLBACK, {}
    return backend, choice.options if choice is not None and choice.backend == backend else {}


def run(backend: str, problem: Problem, device: torch.device, *arguments: object) -> tuple:
    """Call the operator that serves a problem, on its 2-D arguments."""
    name, options = choose(backend, problem, device, capturing(device))
    with current(device):
        return operators(name)[problem.operator](*arguments, **options)


def explain_backend(
    device: torch.device | str, backend: str | None = None, problem: Problem | None = None
) -> tuple[str, str]:
    """Say which backend a call on ``device`` would run, and why, in one clause.

    Without a ``problem`` the answer on a GPU with a table is "auto": the table decides call by call.

    >>> explain_backend("cpu", "torch")
    ('torch', 'asked for by argument')

    Raises:
        ValueError: ``backend`` (or the override in force) names no backend.
    """
    device = torch.device(device)
    by_argument = backend not in (None, "auto")
    asked = backend if by_argument else _forced
    if asked is not None:
        if problem is None:
            reason = get_backend(asked).why_not_on(device)
        else:
            reason = why_not(asked, problem, device)
        if reason is not None:
            return FALLBACK, f"{asked} cannot run: {reason}"
        return (
            asked,
            "asked for by argument"
            if by_argument
            else f"asked for by use_backend or {ENVIRONMENT}",
        )
    if device.type != "cuda":
        return FALLBACK, f"two library matmuls; there is no fused kernel for {device.type}"
    if not torch.cuda.is_available():
        return FALLBACK, "torch sees no GPU"
    table = _device_table(device.index)
    if table is None:
        name = torch.cuda.get_device_name(device)
        return (
            FALLBACK,
            f"two matmuls: nothing was measured on {name} (python -m lowrank_kernels.tune does)",
        )
    if problem is None:
        return "auto", f"the table measured on {table.measured_on} decides call by call"
    name = choose("auto", problem, device)[0]
    return name, f"the table measured on {table.measured_on} says so"
