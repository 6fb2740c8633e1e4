"""Where the CUDA C++ kernels run and what they serve: the two questions a backend answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..backends import Backend, Options
from ..problem import Problem
from . import build

# The widest padded ranks: Hopper holds 512 at 64 rows and 256 at 128, Ampere 256; the feed-forward is Hopper's at 128
# rows.
RANK_LIMIT = {9: 512, 8: 256}
RANK_LIMIT_FFN = 256
ELEMENTS_OF_16_BYTES = 8
# Columns of y, and neurons, that a CTA makes at a time.
COLUMNS, NEURONS = 128, 64
# Below so many rows a cluster always takes less time than one CTA a row tile: on an H100 by a factor of 2 to 4.
FEW_ROWS = 2048


# What a table's entry may choose: the rows of a tile, the CTAs of a cluster, whether the cluster shares the factors.
OPTIONS = {"rows": (0, 64, 128), "cluster": (0, 1, 2, 4, 8), "weights": (False, True)}


def capability(device: torch.device) -> int:
    """The first digit of a GPU's compute capability, or 0 of another device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def why_not_on(device: torch.device) -> str | None:
    """None if the kernels can run on ``device``, else the reason in one clause."""
    module = build.module()
    if module is None:
        return build.why_not_built()
    if device.type != "cuda":
        count, problem = module.devices()
        return problem if count == 0 else f"the kernels run on a GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    wanted = {8: "80", 9: "90a"}.get(major)
    if wanted is None:
        return f"there is no kernel for compute capability {major}.{minor}"
    if wanted not in module.archs:
        return f"the kernels were built without sm_{wanted} (LOWRANK_CUDA_ARCHS)"
    return None


def why_not_for(problem: Problem, device: torch.device) -> str | None:
    """None if the kernels serve ``problem``, else the reason in one clause."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {problem.dtype}"
    for name, width in (
        ("in_features", problem.inner),
        ("out_features", problem.outer),
        ("neurons", problem.hidden),
    ):
        if width % ELEMENTS_OF_16_BYTES:
            return f"{name} {width} is not a multiple of {ELEMENTS_OF_16_BYTES}"
    if problem.operator == "ffn":
        if capability(device) == 8:
            return "the feed-forward kernel is for compute capability 9.0"
        limit = RANK_LIMIT_FFN
    else:
        limit = RANK_LIMIT.get(capability(device), max(RANK_LIMIT.values()))
    if problem.rank > limit:
        return f"rank {problem.rank} is above {limit}: the intermediate does not fit a thread-block cluster"
    return None


def parse_options(options: Options) -> dict[str, Any]:
    """The kernel's shape from a table's entry.

    Raises:
        ValueError: an option is unknown or has a value that no kernel has.
    """
    for name, value in options.items():
        allowed = OPTIONS.get(name, ())
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"impossible option {str(name)[:100]}")
    return dict(options)


def candidates(problem: Problem, device: torch.device) -> Iterator[Options]:
    """The kernel's own choice, and on Hopper every cluster that leaves no CTA without columns (or neurons)."""
    yield {}
    if capability(device) != 9:
        return
    width, unit = (
        (problem.hidden, NEURONS) if problem.operator == "ffn" else (problem.outer, COLUMNS)
    )
    clusters = [size for size in OPTIONS["cluster"] if size and (size - 1) * unit < width]
    if problem.operator == "ffn":
        yield from ({"cluster": size} for size in clusters)
        return
    for rows in (128, 64) if problem.rank <= RANK_LIMIT_FFN else (64,):
        yield from ({"rows": rows, "cluster": size} for size in clusters)
        yield {"rows": rows, "cluster": 2, "weights": True}


def likely(problem: Problem, device: torch.device) -> Iterator[Options]:
    """The kernel's own choice, and for many rows one CTA a row tile, and pairs that share the weights (or neurons)."""
    yield {}
    if capability(device) == 9 and problem.rows >= FEW_ROWS:
        yield {"cluster": 1}
        yield {"cluster": 2} if problem.operator == "ffn" else {"cluster": 2, "weights": True}


def _load() -> Mapping[str, Callable[..., Any]]:
    from .ffn import ffn
    from .linear import linear

    return {"linear": linear, "ffn": ffn}


def _prepare() -> Mapping[str, Callable[..., Any]]:
    from .ffn import FFNPlan
    from .linear import LinearPlan

    return {"linear": LinearPlan, "ffn": FFNPlan}


CUDA = Backend(
    "cuda",
    why_not_on,
    why_not_for,
    _load,
    parse_options,
    candidates,
    likely,
    prepare=_prepare,
    checked_on="H100",
)
