"""Which backend runs a call: the argument, else the override, else a measured table, else two matmuls.

Order of precedence:
1. the argument ``backend=`` of the call or the attribute of the module;
2. ``use_backend(...)`` in force, or the environment variable ``LOWRANK_KERNELS_BACKEND`` read at import;
3. on a GPU, the table measured on that GPU;
4. ``torch``: two library matmuls. A fused kernel is never the default where nobody has measured that it is faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from . import tuning
from .backends import FALLBACK, Backend, Options, get_backend, operators, why_not
from .problem import Problem

ENVIRONMENT = "LOWRANK_KERNELS_BACKEND"

_environment: str | None = os.environ.get(ENVIRONMENT) or None
_forced: str | None = _environment
_blocks: list[list[str | None]] = []
_lock = threading.Lock()
_any_tables: bool = any(list(folder.glob("*.json")) for folder in tuning.folders())


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the calls inside the block on backend ``name`` unless they name their own; None means the automatic choice.

    It holds for all threads: of the blocks that are open at a time, the one entered last counts.

    Raises:
        ValueError: no backend has that name.
    """
    global _forced
    if name is not None and name != "auto":
        get_backend(name)
    block = [None if name == "auto" else name]
    with _lock:
        _blocks.append(block)
        _forced = block[0]
    try:
        yield
    finally:
        with _lock:
            # Threads may leave in another order than they came in.
            _blocks[:] = [other for other in _blocks if other is not block]
            _forced = _blocks[-1][0] if _blocks else _environment


@lru_cache(maxsize=None)
def _device_table(index: int | None) -> tuning.Table | None:
    return tuning.load(torch.cuda.get_device_name(index)) if _any_tables else None


def route(x: Tensor, backend: str | None) -> str:
    """The backend of one call as far as it can be told without its shapes: a name, or "auto" where a table decides.

    Kept free of shapes so that ``torch.compile`` does not specialise on the batch size, and free of calls to the driver
    while it traces: then a table for any GPU leaves the choice to run time.
    """
    if backend is None or backend == "auto":
        backend = _forced
        if backend is None:
            if not x.is_cuda or not _any_tables:
                return FALLBACK
            return (
                "auto"
                if torch.compiler.is_compiling() or _device_table(x.device.index) is not None
                else FALLBACK
            )
    return backend


@lru_cache(maxsize=None)
def _check_device(chosen: Backend, device: torch.device) -> None:
    """Ask a backend once whether it can run on ``device``.

    Raises:
        ValueError: it cannot.
    """
    reason = chosen.why_not_on(device)
    if reason is not None:
        raise ValueError(f"backend is {chosen.name!r}, but {reason}")


def choose(backend: str, problem: Problem, device: torch.device) -> tuple[str, Options]:
    """The backend that serves a problem, and the options that were measured for it (or none).

    A backend that lacks the operator or does not serve the problem gives way to two matmuls.

    Raises:
        ValueError: the backend is unknown or cannot run on ``device``.
    """
    table = _device_table(device.index) if device.type == "cuda" else None
    entry = table.find(problem) if table is not None else None
    if backend == "auto":
        backend = entry.backend if entry is not None else FALLBACK
    chosen = get_backend(backend)
    _check_device(chosen, device)
    if (
        problem.operator not in operators(backend)
        or chosen.why_not_for(problem, device) is not None
    ):
        return FALLBACK, {}
    return backend, entry.options if entry is not None and entry.backend == backend else {}


def run(backend: str, problem: Problem, device: torch.device, *arguments: object) -> tuple:
    """Call the operator that serves a problem, on its 2-D arguments."""
    name, options = choose(backend, problem, device)
    function = operators(name)[problem.operator]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # A launch goes to the current GPU, wherever the tensors are.
        with torch.cuda.device(device):
            return function(*arguments, **options)
    return function(*arguments, **options)


def explain_backend(
    device: torch.device | str, backend: str | None = None, problem: Problem | None = None
) -> tuple[str, str]:
    """Say which backend a call on ``device`` would run, and why, in one clause.

    Without a ``problem`` the answer on a GPU with a table is "auto": the table decides call by call.

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
    name = torch.cuda.get_device_name(device)
    if _device_table(device.index) is None:
        return (
            FALLBACK,
            f"two matmuls: nothing was measured on {name} (python -m lowrank_kernels.tune does)",
        )
    if problem is None:
        return "auto", f"the table measured on {name} decides call by call"
    return choose("auto", problem, device)[0], f"the table measured on {name} says so"
