"""What every launcher needs: the matmul precision, the interpreter's needs, row-contiguous inputs, the tile."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import checks
from ..backends import interpreted
from .tiles import Tile, default

INDEX_LIMIT = 2**31


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def options(x: Tensor) -> dict[str, object]:
    """The constexpr arguments that follow from the dtype and from torch's own switches."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": x.dtype == torch.bfloat16 and x.device.type == "cpu" and interpreted(),
    }


def meta(tile: Tile) -> dict[str, object]:
    """The compile options of a launch."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def rows_of(x: Tensor) -> Tensor:
    """A 2-D tensor whose last dimension is contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def small_enough(factor: Tensor, name: str) -> Tensor:
    """Refuse a factor whose 32-bit offsets would overflow.

    Raises:
        ValueError: the factor has 2**31 elements or more.
    """
    if factor.numel() >= INDEX_LIMIT:
        raise checks.shape_error(name, tuple(factor.shape), "fewer than 2**31 elements for the fused kernels")
    return factor


def pick(operator: str, tile: Tile | None, x: Tensor, rank: int, columns: int) -> Tile:
    """The tile asked for, or the default one; ``columns`` is the extent that splits divide."""
    if tile is not None:
        return tile
    return default(operator, rank, x.element_size(), x.shape[0], -(-columns // 64), processors(x.device))
