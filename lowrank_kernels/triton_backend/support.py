"""Where the Triton kernels run and what they serve, and the backend's registration. Imports no Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import torch

from ..backends import Backend, Options
from ..problem import RANK_CLASSES, SENTENCE, Problem
from .device import facts, family, interpreted, shared_bytes
from .tiles import OPERATORS, SPLITS, Tile, attention_space, fits, space, with_split

# The widest ranks that the kernels hold in registers: in 16 bits, in float32, and in a feed-forward.
RANK_LIMIT = RANK_CLASSES[-1]
RANK_LIMIT_FP32 = 256
RANK_LIMIT_FFN = 384
# The widest rows of ``norm``.
NORM_LIMIT = 8192
# The largest heads of ``attention``.
HEAD_LIMIT = 128
# The tuner tries a split as long as it makes no more programs than this.
MOST_PROGRAMS = 640


def why_not_on(device: torch.device) -> str | None:
    """None if the kernels can run on ``device``, else the reason in one clause."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if interpreted():
            return None
        return "triton needs a GPU (on a CPU only its interpreter, TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"triton does not run on {device.type} here"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "the kernels have not been made for AMD GPUs (linear_norm would race there)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; below 8.0 Triton "
            "uses no tensor cores"
        )
    if facts(device).family is None:
        return (
            f"the tiles need 99 KiB of shared memory and the GPU has {shared_bytes(device)} bytes"
        )
    return None


def _head_size(problem: Problem) -> int:
    """Of attention: the larger of the sizes of a head's scores and values."""
    return max(problem.inner, problem.outer) // max(problem.hidden, 1)


def why_not_for(problem: Problem, device: torch.device) -> str | None:
    """None if the kernels serve ``problem``, else the reason in one clause."""
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"triton kernels do not take {problem.dtype}"
    if problem.operator == "norm" and problem.outer > NORM_LIMIT:
        return f"rows of {problem.outer} are wider than {NORM_LIMIT}: they do not fit the registers"
    if problem.operator == "attention":
        size = _head_size(problem)
        if device.type == "cuda" and problem.dtype == torch.float32:
            return "attention is made for 16 bits: in float32 it spills"
        return f"heads of {size} are larger than {HEAD_LIMIT}" if size > HEAD_LIMIT else None
    limit = RANK_LIMIT_FFN if problem.operator == "ffn" else RANK_LIMIT
    limit = RANK_LIMIT_FP32 if problem.dtype == torch.float32 else limit
    if problem.rank > limit:
        return f"rank {problem.rank} is above {limit}: the intermediate does not fit the registers"
    return None


def parse_options(options: Options) -> dict[str, Any]:
    """The tile of a table's entry: ``{"tile": {...}}`` with the fields of ``Tile``, or nothing.

    Raises:
        ValueError: no kernel can be compiled for that tile, or there is another option.
        TypeError: a field is missing or unknown.
    """
    unknown = set(options) - {"tile"}
    if unknown:
        raise ValueError(f"unknown option {str(min(unknown, key=str))[:100]}")
    if options.get("tile") is None:
        return {}
    tile = Tile(**options["tile"])
    if not fits(tile):
        raise ValueError("impossible tile")
    return {"tile": tile}


def candidates(problem: Problem, device: torch.device) -> Iterator[Options]:
    """Every tile of the space with every split that the problem's rows leave room for."""
    if problem.operator not in OPERATORS:
        yield from _without_factors(problem)
        return
    itemsize = problem.dtype.itemsize
    for tile in space(problem.operator, problem.rank, itemsize, family(device)):
        blocks = -(-problem.rows // tile.block_m)
        for splits in (1,) if problem.operator == "linear_norm" else SPLITS:
            if splits == 1 or blocks * splits <= MOST_PROGRAMS:
                yield {"tile": asdict(replace(tile, splits=splits))}


def likely(problem: Problem, device: torch.device) -> Iterator[Options]:
    """Every tile of the space with its best split; a tile for few rows up to some hundreds, and below 64 no other."""
    if problem.operator not in OPERATORS:
        yield from _without_factors(problem)
        return
    width = problem.hidden if problem.operator == "ffn" else problem.outer
    processors = facts(device).processors
    tiles = space(problem.operator, problem.rank, problem.dtype.itemsize, family(device))
    few = tuple(tile for tile in tiles if tile.block_m < 64)
    if problem.rows < 64:
        tiles = few or tiles
    elif problem.rows > 4 * processors:
        tiles = tuple(tile for tile in tiles if tile not in few) or few
    for tile in tiles:
        if problem.operator != "linear_norm":
            tile = with_split(
                tile, problem.operator, problem.rows, problem.inner, width, processors
            )
        yield {"tile": asdict(tile)}


def _without_factors(problem: Problem) -> Iterator[Options]:
    """The candidates of ``norm``, which has no tiles, and of ``attention``, whose rows are of sentences."""
    if problem.operator == "norm":
        yield {}
        return
    for tile in attention_space(min(problem.rows, SENTENCE), _head_size(problem)):
        yield {"tile": asdict(tile)}


def _compile_ahead() -> AbstractContextManager[None]:
    from .launch import compile_ahead

    return compile_ahead()


def _load() -> Mapping[str, Callable[..., Any]]:
    from .ffn import ffn
    from .linear import linear
    from .linear_norm import linear_norm
    from .norm import norm
    from .qkv import qkv

    return {
        **{"linear": linear, "qkv": qkv, "ffn": ffn},
        **{"linear_norm": linear_norm, "norm": norm},
    }


def _prepare() -> Mapping[str, Callable[..., Any]]:
    from .attention import AttentionPlan
    from .ffn import FFNPlan
    from .linear import LinearPlan
    from .linear_norm import LinearNormPlan
    from .norm import NormPlan
    from .qkv import QKVPlan

    return {
        **{"linear": LinearPlan, "qkv": QKVPlan, "ffn": FFNPlan},
        **{"linear_norm": LinearNormPlan, "norm": NormPlan, "attention": AttentionPlan},
    }


TRITON = Backend(
    "triton",
    why_not_on,
    why_not_for,
    _load,
    parse_options,
    candidates,
    likely,
    _compile_ahead,
    _prepare,
    checked_on="H100",
)
