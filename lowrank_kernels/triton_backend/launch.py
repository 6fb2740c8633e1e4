"""What every launcher needs: the matmul precision, the interpreter's needs, row-contiguous inputs, the tile."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..alignment import pad_rank
from .device import has_wgmma, interpreted, processors
from .tiles import Tile, default

INDEX_LIMIT = 2**31


def numeric_options(x: Tensor) -> dict[str, object]:
    """The constexpr arguments that follow from the dtype and from torch's own switches."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": x.dtype == torch.bfloat16 and x.device.type == "cpu" and interpreted(),
    }


def launch_options(tile: Tile) -> dict[str, object]:
    """The compile options of a launch."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def rows_of(x: Tensor) -> Tensor:
    """A 2-D tensor whose last dimension is contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def aligned(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """A factor pair as the kernels load it, and the rank it is padded to.

    A row of 245 16-bit elements does not start on a 16-byte boundary, which rules out wide loads: such a pair is copied
    with zeros up to a multiple of 16. ``align_factors`` does this once instead of at every call.

    Raises:
        ValueError: a factor has 2**31 elements or more (offsets inside a factor have 32 bits).
    """
    for name, factor in (("down", down), ("up", up)):
        if factor.numel() >= INDEX_LIMIT:
            raise checks.shape_error(
                name, tuple(factor.shape), "fewer than 2**31 elements for the fused kernels"
            )
    down, up = pad_rank(down, up)
    return down, up, down.shape[0]


def resolve_tile(operator: str, tile: Tile | None, x: Tensor, rank: int, columns: int) -> Tile:
    """The tile asked for, or the default one; ``columns`` is the extent that splits divide."""
    if tile is not None:
        return tile
    hopper = has_wgmma(x.device)
    return default(
        operator,
        rank,
        x.element_size(),
        x.shape[0],
        -(-columns // 64),
        processors(x.device),
        hopper,
    )
