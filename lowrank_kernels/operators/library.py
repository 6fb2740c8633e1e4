"""What the four operators share: the library they register in, autocast, and the way to and from two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Others = TypeVarTuple("Others")

# The package's name: a copy that is loaded under another one (``tools.hub_folder``) has operators of its own.
NAMESPACE = __name__.partition(".")[0]
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS = getattr(torch.ops, NAMESPACE)


def register(
    schema: str, run: Callable, fake: Callable, setup: Callable, backward: Callable
) -> None:
    """Define an operator: its implementation on CPU and CUDA, its shapes for tracing, and its gradient.

    The gradient is computed by kernels that have no gradient of their own, so differentiating twice is refused.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    once = torch.autograd.function.once_differentiable(backward)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", once, setup_context=setup, lib=LIBRARY)


def autocast(x: Tensor, *others: Unpack[Others]) -> tuple[Tensor, Unpack[Others]]:
    """Cast x and the others (tensors or None) to autocast's dtype where autocast is on for the device of x.

    As torch does, float64 is left alone.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    tensors = tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in (x, *others)
    )
    return cast("tuple[Tensor, Unpack[Others]]", tensors)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def flat(x: Tensor) -> Tensor:
    """x (..., width) as (rows, width)."""
    if x.dim() == 2:
        return x
    # flatten, for reshape(-1, width) cannot count the rows of a tensor without elements.
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """y (rows, width) with the leading dimensions of x (..., anything)."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """An operator's optional output: the value, or an empty tensor in its place (a schema has no optional outputs)."""
    return like.new_empty(0) if value is None else value
