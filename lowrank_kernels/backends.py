"""The registry of backends: who can run the operators, where, and if not, why not.

A backend is data: a name, a test of the device, a test of the problem and a loader of its operator functions. A new
one is added by one call of ``register_backend``; nothing else in the package knows it. Operators are loaded on first
use, so that importing the package imports no compiler and touches no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

# The widest ranks that the Triton kernels hold in registers, in 16 bits, in float32, and in a feed-forward.
TRITON_RANK_LIMIT = 512
TRITON_RANK_LIMIT_FP32 = 256
TRITON_RANK_LIMIT_FFN = 384
# What a block may use on an A100, the smallest GPU that the tiles are checked for.
TRITON_SHARED_BYTES = 163 * 1024


class Problem(NamedTuple):
    """One call of an operator as the dispatcher sees it.

    ``rank``, ``inner`` and ``outer`` are the largest of the operator's factor pairs; ``hidden`` is the number of
    neurons of a feed-forward and 0 elsewhere.
    """

    operator: str
    rows: int
    inner: int
    outer: int
    rank: int
    dtype: torch.dtype
    hidden: int = 0


@dataclass(frozen=True)
class Backend:
    """What the dispatcher needs to know of a backend.

    Attributes:
        name: as users write it in ``backend=``.
        why_not_on: device -> None if the backend can run there, else the reason in one clause.
        why_not_for: problem -> None if the backend serves it, else the reason in one clause.
        load: returns the operator functions by name: ``linear``, ``qkv``, ``ffn``, ``linear_norm``; those it lacks are
            served by ``torch``. Each takes 2-D inputs, the arguments of the function of that name that ``torch``
            registers, and, if the tuning table may hold tiles for it, a keyword ``tile``.
        measured: False while no kernel of the backend has run on a GPU; shown by ``python -m lowrank_kernels.env``.
    """

    name: str
    why_not_on: Callable[[torch.device], str | None]
    why_not_for: Callable[[Problem], str | None]
    load: Callable[[], Mapping[str, Callable]]
    measured: bool = False


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name."""
    _backends[backend.name] = backend
    operators.cache_clear()


def backend_names() -> tuple[str, ...]:
    """The names that ``backend=`` accepts."""
    return tuple(_backends)


def get_backend(name: str) -> Backend:
    """Look a backend up.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in _backends:
        raise ValueError(
            f"backend is {name!r}; it must be None, 'auto' or one of {', '.join(_backends)}"
        )
    return _backends[name]


@lru_cache(maxsize=None)
def operators(name: str) -> Mapping[str, Callable]:
    """The operator functions of a backend, loaded once."""
    return get_backend(name).load()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_torch() -> Mapping[str, Callable]:
    from .reference.ffn import ffn
    from .reference.linear import linear_saving
    from .reference.linear_norm import linear_norm
    from .reference.qkv import qkv

    return {"linear": linear_saving, "qkv": qkv, "ffn": ffn, "linear_norm": linear_norm}


def _load_dense() -> Mapping[str, Callable]:
    from .reference.linear import dense_linear

    return {"linear": dense_linear}


def _load_triton() -> Mapping[str, Callable]:
    from .triton_backend.ffn import ffn
    from .triton_backend.linear import linear
    from .triton_backend.linear_norm import linear_norm
    from .triton_backend.qkv import qkv

    return {"linear": linear, "qkv": qkv, "ffn": ffn, "linear_norm": linear_norm}


def _triton_why_not_on(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return (
            None
            if interpreted()
            else "triton needs a GPU (on a CPU only its interpreter, TRITON_INTERPRET=1)"
        )
    if device.type != "cuda":
        return f"triton does not run on {device.type} here"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared < TRITON_SHARED_BYTES:
        return (
            f"the tiles need {TRITON_SHARED_BYTES} bytes of shared memory and the GPU has {shared}"
        )
    return None


def _triton_why_not_for(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"triton kernels do not take {problem.dtype}"
    limit = TRITON_RANK_LIMIT_FFN if problem.operator == "ffn" else TRITON_RANK_LIMIT
    limit = TRITON_RANK_LIMIT_FP32 if problem.dtype == torch.float32 else limit
    if problem.rank > limit:
        return f"rank {problem.rank} is above {limit}: the intermediate does not fit the registers"
    return None


# The CUDA C++ backend answers its own questions; its files are loaded when they are first asked.
def _load_cuda() -> Mapping[str, Callable]:
    from .cuda_backend.ffn import ffn
    from .cuda_backend.linear import linear

    return {"linear": linear, "ffn": ffn}


def _cuda_why_not_on(device: torch.device) -> str | None:
    from .cuda_backend.support import why_not_on

    return why_not_on(device)


def _cuda_why_not_for(problem: Problem) -> str | None:
    from .cuda_backend.support import why_not_for

    return why_not_for(problem)


def _anywhere(_: object) -> None:
    return None


register_backend(Backend("torch", _anywhere, _anywhere, _load_torch, measured=True))
register_backend(Backend("dense", _anywhere, _anywhere, _load_dense, measured=True))
register_backend(Backend("triton", _triton_why_not_on, _triton_why_not_for, _load_triton))
register_backend(Backend("cuda", _cuda_why_not_on, _cuda_why_not_for, _load_cuda))
