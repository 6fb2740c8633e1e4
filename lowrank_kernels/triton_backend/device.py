"""What the launchers and the tiles need to know of a device."""

from __future__ import annotations

import os
from functools import lru_cache

import torch


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=None)
def has_wgmma(device: torch.device) -> bool:
    """Whether the GPU is a Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
