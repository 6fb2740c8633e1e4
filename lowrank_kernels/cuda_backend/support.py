"""Where the CUDA C++ kernels run and what they serve: the two questions a backend answers."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..backends import Problem
from . import build

# The widest padded ranks: Hopper holds 512 at 64 rows and 256 at 128, Ampere 256; the feed-forward is Hopper's at 128 rows.
RANK_LIMIT = {9: 512, 8: 256}
RANK_LIMIT_FFN = 256
ELEMENTS_OF_16_BYTES = 8


@lru_cache(maxsize=None)
def capability() -> int:
    """The compute capability's first digit of the current GPU, or 0 where there is none."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def why_not_on(device: torch.device) -> str | None:
    """None if the kernels can run on ``device``, else the reason in one clause."""
    reason = build.why_not_built()
    if reason is not None:
        return reason
    if device.type != "cuda":
        count, problem = build.module().devices()
        return problem if count == 0 else f"the kernels run on a GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    wanted = {8: "80", 9: "90a"}.get(major)
    if wanted is None:
        return f"there is no kernel for compute capability {major}.{minor}"
    if wanted not in build.module().archs:
        return f"the kernels were built without sm_{wanted} (LOWRANK_CUDA_ARCHS)"
    return None


def why_not_for(problem: Problem) -> str | None:
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
        if capability() == 8:
            return "the feed-forward kernel is for compute capability 9.0"
        limit = RANK_LIMIT_FFN
    else:
        limit = RANK_LIMIT.get(capability(), max(RANK_LIMIT.values()))
    if problem.rank > limit:
        return f"rank {problem.rank} is above {limit}: the intermediate does not fit a thread-block cluster"
    return None
