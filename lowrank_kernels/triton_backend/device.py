"""What the launchers and the tiles need to know of a device."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

from .tiles import Family


class Facts(NamedTuple):
    """A device as the tiles see it: its family of tiles, None if there is none for it, and its multiprocessors."""

    family: Family | None
    processors: int


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def family_of(capability: tuple[int, int], shared_bytes: int) -> Family | None:
    """The tiles for a compute capability and the shared memory that a block may use, or None if there are none."""
    if capability < (8, 0):
        return None
    by_major = {9: Family.HOPPER, 10: Family.BLACKWELL, 12: Family.COMPACT_BLACKWELL}
    wanted = by_major.get(capability[0], Family.AMPERE)
    return next((f for f in (wanted, Family.COMPACT) if shared_bytes >= f.shared_bytes), None)


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may use on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    # Builds of torch for AMD have only the second.
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@cache
def facts(device: torch.device) -> Facts:
    """The facts of a device; the interpreter passes for a Hopper with one multiprocessor."""
    if device.type != "cuda":
        return Facts(Family.HOPPER, 1)
    family = family_of(torch.cuda.get_device_capability(device), shared_bytes(device))
    return Facts(family, torch.cuda.get_device_properties(device).multi_processor_count)


def family(device: torch.device) -> Family:
    """The tiles of a device.

    Raises:
        ValueError: there are none for it.
    """
    result = facts(device).family
    if result is None:
        raise ValueError(f"there are no Triton tiles for {device}")
    return result
