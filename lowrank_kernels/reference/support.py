"""The backends of library calls: ``torch`` (two matmuls) serves everything, ``dense`` multiplies the factors first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..backends import FALLBACK, Backend


def _load_torch() -> Mapping[str, Callable[..., Any]]:
    from .ffn import ffn
    from .linear import linear_saving
    from .linear_norm import linear_norm
    from .qkv import qkv

    return {"linear": linear_saving, "qkv": qkv, "ffn": ffn, "linear_norm": linear_norm}


def _load_dense() -> Mapping[str, Callable[..., Any]]:
    from .linear import dense_linear

    return {"linear": dense_linear}


def _no_objection(*_: object) -> None:
    return None


TORCH = Backend(FALLBACK, _no_objection, _no_objection, _load_torch, verified=True)
DENSE = Backend("dense", _no_objection, _no_objection, _load_dense, verified=True)
