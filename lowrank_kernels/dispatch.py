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
from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import Problem, get_backend

ENVIRONMENT = "LOWRANK_KERNELS_BACKEND"

_forced: str | None = os.environ.get(ENVIRONMENT) or None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the calls inside the block on backend ``name`` unless they name their own; None means the automatic choice.

    Raises:
        ValueError: no backend has that name.
    """
    global _forced
    if name is not None and name != "auto":
        get_backend(name)
    previous, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = previous


def route(x: Tensor, backend: str | None) -> str:
    """The backend of one call as far as it can be told without looking at shapes: a name, or "auto" for the table.

    Kept free of shapes so that ``torch.compile`` does not specialise on the batch size.
    """
    if backend is None or backend == "auto":
        backend = _forced
        if backend is None:
            return "torch"
    return backend


def explain_backend(device: torch.device | str, backend: str | None = None) -> tuple[str, str]:
    """Say which backend a call on ``device`` would run, and why, in one clause.

    Raises:
        ValueError: ``backend`` (or the override in force) names no backend.
    """
    device = torch.device(device)
    asked = backend if backend not in (None, "auto") else _forced
    if asked is not None:
        reason = get_backend(asked).why_not_on(device)
        by = "asked for by argument" if backend not in (None, "auto") else f"asked for by use_backend or {ENVIRONMENT}"
        return (asked, by) if reason is None else ("torch", f"{asked} cannot run: {reason}")
    if device.type != "cuda":
        return "torch", f"two library matmuls are at the floor on {device.type}; no fused kernel is needed"
    name = torch.cuda.get_device_name(device)
    return "torch", f"no measured table for {name}: two matmuls (python -m lowrank_kernels.tune makes one)"
