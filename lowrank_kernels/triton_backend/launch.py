"""What every launcher needs: the matmul precision, aligned factors, the tile, and launches that skip Triton's binder.

A plan holds one operator's factors as its kernel takes them: aligned, their addresses and strides read once. Calling it
costs what depends on the input alone. Triton's own ``kernel[grid](...)`` inspects every argument at every call, which
takes the host longer than a small kernel runs; so the compiled form that the first such call returns is kept, under a
key of everything that Triton specialises on, and launched directly from then on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..alignment import pad_rank
from . import device
from .tiles import Tile, default

if TYPE_CHECKING:
    from typing_extensions import Unpack

INDEX_LIMIT = 2**31
# Triton's compiled kernels by kernel, device, compile options, sizes and which optional pointers are there.
_compiled: dict[tuple, Any] = {}
# Forms kept at most; a model needs some dozens, a sweep over sizes may make thousands.
COMPILED_LIMIT = 4096
# Compilers at a time, ahead of a measurement.
MOST_COMPILERS = 8
# Whether launches compile their kernel and do not run it.
_only_compiling = False


@contextlib.contextmanager
def compile_ahead() -> Iterator[None]:
    """Launches inside the block compile their kernels, several at a time, and run nothing: results are garbage.

    All are compiled when the block ends. One that cannot be compiled fails where it is launched for good.
    """
    global _only_compiling
    from triton import AsyncCompileMode

    _only_compiling = True
    try:
        with (
            ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        _only_compiling = False


def allows_tf32() -> bool:
    """Whether torch may use TF32 in float32 matmuls, by its new switch where it has one.

    Reading the old switch raises an error once the new one was set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def precision(x: Tensor) -> str:
    """Triton's input precision of products with elements like those of ``x``."""
    return "tf32" if x.dtype == torch.float32 and allows_tf32() else "ieee"


def upcast(x: Tensor) -> bool:
    """Whether the interpreter's wrong bfloat16 products must be avoided."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and device.interpreted()


def rows_of(x: Tensor) -> Tensor:
    """A 2-D tensor whose last dimension is contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def aligned(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """A factor pair as the kernels load it, and the rank it is padded to.

    A row of 245 16-bit elements does not start on a 16-byte boundary, which rules out wide loads: such a pair is copied
    with zeros up to a multiple of 16. ``align_factors`` does this once instead of at every call.

    Raises:
        ValueError: a factor reaches over 2**31 elements or more (offsets inside a factor have 32 bits).
    """
    for name, factor in (("down", down), ("up", up)):
        reach = sum(
            (n - 1) * stride for n, stride in zip(factor.shape, factor.stride(), strict=True) if n
        )
        if reach >= INDEX_LIMIT:
            raise checks.shape_error(
                name, tuple(factor.shape), "to reach over fewer than 2**31 elements"
            )
    down, up = pad_rank(down, up)
    return down, up, down.shape[0]


def contiguous(vector: Tensor | None) -> Tensor | None:
    """A bias or a weight of LayerNorm as the kernels load it."""
    return None if vector is None else vector.contiguous()


def resolve_tile(operator: str, tile: Tile | None, x: Tensor, rank: int, width: int) -> Tile:
    """The tile asked for, or the default one; ``width`` is the extent that splits divide."""
    if tile is not None:
        return tile
    processors = device.facts(x.device).processors
    return default(
        operator,
        rank,
        x.element_size(),
        x.shape[0],
        x.shape[1],
        width,
        processors,
        device.family(x.device),
    )


def launch(
    kernel: Any,
    blocks: int,
    tile: Tile,
    pointers: tuple[Tensor, Unpack[tuple[Tensor | None, ...]]],
    sizes: tuple[int, ...],
    numbers: tuple,
    constants: tuple,
) -> None:
    """Run ``kernel(*pointers, *sizes, *numbers, *constants)`` on the current stream.

    Args:
        kernel: a Triton kernel with its parameters in that order.
        blocks: programs.
        tile: for Triton's num_warps and num_stages.
        pointers: tensors of the dtype of the first, on its device; None where an optional one is left out. A float32
            workspace may be among them as long as the constants tell whether it is there.
        sizes: integers that the kernel does not specialise on, each below 2**31.
        numbers: integers and floats that it does specialise on.
        constants: its compile-time arguments.
    """
    first = pointers[0]
    addresses: list[int | None] = []
    present: list[bool] = []
    bits = 0
    for pointer in pointers:
        if pointer is None:
            addresses.append(None)
            present.append(False)
        else:
            address = pointer.data_ptr()
            bits |= address
            addresses.append(address)
            present.append(True)
    # What does not start on 16 bytes is specialised pointer by pointer: left to Triton.
    key: tuple | None = None
    if bits & 15 == 0:
        key = (kernel, first.device.index, first.dtype, tile.warps, tile.stages, *present)
        key += (numbers, constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(blocks, 1, 1)](*addresses, *sizes, *numbers, *constants)
            return
    if _only_compiling:
        kernel.warmup(
            *pointers,
            *sizes,
            *numbers,
            *constants,
            grid=(blocks,),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        return
    compiled = kernel[(blocks,)](
        *pointers,
        *sizes,
        *numbers,
        *constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    # The interpreter returns nothing.
    if key is not None and compiled is not None:
        if len(_compiled) >= COMPILED_LIMIT:
            _compiled.clear()
        _compiled[key] = compiled
