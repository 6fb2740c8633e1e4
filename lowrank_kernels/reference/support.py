"""The backends of library calls: ``torch`` (two matmuls) serves everything, ``dense`` and ``stacked`` merge factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..backends import FALLBACK, Backend


def _load_torch() -> Mapping[str, Callable[..., Any]]:
    from .attention import attention
    from .ffn import ffn
    from .linear import linear_saving
    from .linear_norm import linear_norm
    from .norm import norm
    from .qkv import qkv

    return {
        **{"linear": linear_saving, "qkv": qkv, "ffn": ffn},
        **{"linear_norm": linear_norm, "norm": norm, "attention": attention},
    }


def _load_dense() -> Mapping[str, Callable[..., Any]]:
    from .linear import dense_linear

    return {"linear": dense_linear}


def _prepare_dense() -> Mapping[str, Callable[..., Any]]:
    from . import merged

    return {
        "linear": merged.dense_linear,
        "qkv": merged.dense_qkv,
        "ffn": merged.dense_ffn,
        "linear_norm": merged.dense_linear_norm,
    }


def _prepare_stacked() -> Mapping[str, Callable[..., Any]]:
    from .merged import stacked_qkv

    return {"qkv": stacked_qkv}


def _no_objection(*_: object) -> None:
    return None


TORCH = Backend(FALLBACK, _no_objection, _no_objection, _load_torch, checked_on="any device")
DENSE = Backend(
    "dense",
    _no_objection,
    _no_objection,
    _load_dense,
    prepare=_prepare_dense,
    prepared_only=True,
    checked_on="any device",
)
STACKED = Backend(
    "stacked",
    _no_objection,
    _no_objection,
    dict,
    prepare=_prepare_stacked,
    prepared_only=True,
    checked_on="any device",
)
