"""Argument checks shared by all operators: one line that names the argument, what it had and what it needs.

They run before any launch, so that a wrong call never leaves a sticky device error behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shape_error(name: str, had: tuple[int, ...], needs: str) -> ValueError:
    return ValueError(f"{name} has shape {tuple(had)}; it needs {needs}")


def factors(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, tag: str = "") -> None:
    """Check one factor pair against the input it multiplies; ``tag`` is appended to the argument names.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype is not supported or differs from that of ``x`` (outside autocast).
    """
    if down.dim() != 2:
        raise shape_error(f"down{tag}", down.shape, "2 dimensions (rank, in_features)")
    if up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise shape_error(
            f"up{tag}", up.shape, f"(out_features, {down.shape[0]}) to follow down{tag}"
        )
    if x.dim() == 0 or x.shape[-1] != down.shape[1]:
        raise shape_error(
            "x", x.shape, f"(..., {down.shape[1]}) to enter down{tag} {tuple(down.shape)}"
        )
    if bias is not None and bias.shape != up.shape[:1]:
        raise shape_error(f"bias{tag}", bias.shape, f"({up.shape[0]},) to follow up{tag}")
    if down.shape[0] == 0:
        raise shape_error(f"down{tag}", down.shape, "a rank of at least 1")
    alike(x, down, f"down{tag}")
    alike(x, up, f"up{tag}")
    if bias is not None:
        alike(x, bias, f"bias{tag}")


def alike(x: Tensor, other: Tensor, name: str) -> None:
    """Check that ``other`` lives where ``x`` lives and has its dtype, unless autocast will cast both."""
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}; it needs {x.device}, where x is")
    if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name} has dtype {other.dtype}; it needs {x.dtype}, the dtype of x (or autocast)"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x has dtype {x.dtype}; it needs one of bfloat16, float16, float32, float64"
        )


def row_like(name: str, value: Tensor, x: Tensor, width: int) -> None:
    """Check a tensor that has a row for every row of ``x``: shape (..., width)."""
    if value.shape[:-1] != x.shape[:-1] or value.dim() == 0 or value.shape[-1] != width:
        raise shape_error(name, value.shape, f"{(*x.shape[:-1], width)}")
    alike(x, value, name)


def second_pair(x: Tensor, up1: Tensor, down2: Tensor, up2: Tensor, bias2: Tensor | None) -> None:
    """Check the second factor pair of a feed-forward against the neurons that the first one makes."""
    if down2.dim() != 2 or down2.shape[0] == 0 or down2.shape[1] != up1.shape[0]:
        raise shape_error(
            "down2", down2.shape, f"(rank of at least 1, {up1.shape[0]}) to follow up1"
        )
    if up2.dim() != 2 or up2.shape[1] != down2.shape[0]:
        raise shape_error("up2", up2.shape, f"(out_features, {down2.shape[0]}) to follow down2")
    if bias2 is not None and bias2.shape != up2.shape[:1]:
        raise shape_error("bias2", bias2.shape, f"({up2.shape[0]},) to follow up2")
    for name, value in (("down2", down2), ("up2", up2), ("bias2", bias2)):
        if value is not None:
            alike(x, value, name)


def norm(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check the vectors of a LayerNorm over the features that ``up`` makes."""
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value.shape != up.shape[:1]:
            raise shape_error(name, value.shape, f"({up.shape[0]},) to follow up")
        alike(x, value, name)
