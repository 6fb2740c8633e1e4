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
_compiled: dict[tuple, Kept] = {}
# Forms kept at most; a model needs some dozens, a sweep over sizes may make thousands.
COMPILED_LIMIT = 4096
# Compilers at a time, ahead of a measurement.
MOST_COMPILERS = 8
# Whether launches compile their kernel and do not run it.
_only_compiling = False


class Kept:
    """A compiled kernel, and what launching it takes: what ``kernel[grid]`` would look up at every call."""

    __slots__ = ("compiled", "driver", "function", "metadata", "run", "runtime")

    def __init__(self, compiled: Any) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.compiled, self.driver, self.runtime = compiled, driver, knobs.runtime
        self.run = compiled.run
        self.function, self.metadata = compiled.function, compiled.packed_metadata

    def is_watched(self) -> bool:
        """Whether a profiler wants to be told of launches."""
        hook = self.runtime.launch_enter_hook
        return hook is not None and bool(getattr(hook, "calls", True))


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


def resolve_tile(
    operator: str, tile: Tile | None, x: Tensor, rank: int, width: int, kept: dict[int, Tile]
) -> Tile:
    """The tile asked for, or the default one.

    Args:
        width: the extent that splits divide.
        kept: a plan's tiles by rows; the default one is added.
    """
    if tile is None:
        tile = kept.get(x.shape[0])
    if tile is None:
        sizes = (x.element_size(), x.shape[0], x.shape[1], width)
        processors = device.facts(x.device).processors
        tile = default(operator, rank, *sizes, processors, device.family(x.device))
        if len(kept) >= COMPILED_LIMIT:
            kept.clear()
        kept[x.shape[0]] = tile
    return tile


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
    present = bits = 0
    for pointer in pointers:
        present <<= 1
        if pointer is None:
            addresses.append(None)
        else:
            address = pointer.data_ptr()
            bits |= address
            addresses.append(address)
            present |= 1
    index = first.device.index
    # What does not start on 16 bytes is specialised pointer by pointer: left to Triton.
    key: tuple | None = None
    if bits & 15 == 0:
        # A kernel's own hash costs more than the rest of the key.
        key = (id(kernel), index, first.dtype, tile.warps, tile.stages, present, numbers, constants)
        kept = _compiled.get(key)
        if kept is not None:
            if kept.is_watched():
                kept.compiled[(blocks, 1, 1)](*addresses, *sizes, *numbers, *constants)
                return
            stream = kept.driver.active.get_current_stream(index)
            kept.run(
                *(blocks, 1, 1, stream, kept.function, kept.metadata, None, None, None),
                *addresses,
                *sizes,
                *numbers,
                *constants,
            )
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
        _compiled[key] = Kept(compiled)
