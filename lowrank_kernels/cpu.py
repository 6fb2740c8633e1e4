"""The compiled CPU kernels of ``csrc/cpu``: linear layers in int8 and float32 with packed weights, and whole encoders.

The module ``lowrank_kernels._cpu`` is made by ``pip install`` where there is a C++ compiler for x86-64; without it
callers use library calls. It has kernels for several instruction sets ("levels") and the processor decides which can
run. What is built here keeps packed copies of the weights it was given.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

MODULE = f"{__name__.partition('.')[0]}._cpu"


@cache
def module() -> Any:
    """The compiled module, or None where the installation has none."""
    return importlib.import_module(MODULE) if importlib.util.find_spec(MODULE) is not None else None


@cache
def levels() -> tuple[str, ...]:
    """The levels that this build and this processor have, best first: "avx512_vnni", "avx_vnni", "avx2", or none."""
    return () if module() is None else tuple(module().levels())


def why_not() -> str | None:
    """None if the kernels can be used here, else the reason in one clause."""
    if module() is None:
        return "not built: no C++17 compiler for x86-64 was found when the package was installed"
    return None if levels() else "the processor has no AVX2"


def largest_code(level: str) -> int:
    """The largest byte that an activation may have: larger ones would overflow the level's sums of pairs."""
    return module().largest_code(level)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.shape[0], x.shape[1], x.stride(0)


def codes(scale: float, zero: int, top: int) -> Any:
    """How floats are bytes: scale * (byte - zero), bytes from 0 to ``top``."""
    return module().Codes(scale, zero, top)


def product(level: str, weight: Tensor, bias: Tensor | None, factor: float = 1.0) -> Any:
    """factor * (x W^T + bias) in float32; W (out, in)."""
    weight, bias = (factor * weight.detach()).float().contiguous(), _floats(bias)
    bias = None if bias is None else factor * bias
    return module().Product(level, _matrix(weight), _address(bias))


def product8(
    level: str, weight: Tensor, scale: Tensor, bias: Tensor | None, source: Any, factor: float = 1.0
) -> Any:
    """factor * (x W^T + bias) for x encoded by ``source``; W = scale (out,) times int8 ``weight`` (out, in).

    Raises:
        ValueError: ``source`` has larger bytes than the level can take.
    """
    weight, scale, bias = weight.contiguous(), factor * scale.float(), _floats(bias)
    bias = None if bias is None else factor * bias
    return module().Product(level, _matrix(weight), _address(scale), _address(bias), source)


def linear(products: Sequence[Any], inner: Any = None) -> Any:
    """A layer of one product, or of two with an intermediate that is encoded by ``inner`` if they are int8."""
    return module().Linear(list(products), inner or codes(1.0, 0, 255))


def encoding(multiplier: Tensor, zero: int, top: int) -> Any:
    """round(x * multiplier) + zero, between 0 and top; multiplier (width,)."""
    multiplier = multiplier.float().contiguous()
    return module().Encoding(multiplier.data_ptr(), len(multiplier), zero, top)


def norm(weight: Tensor, bias: Tensor | None, epsilon: float, shift: Tensor | None = None) -> Any:
    """LayerNorm(x + shift)."""
    weight, bias, shift = weight.detach().float().contiguous(), _floats(bias), _floats(shift)
    return module().Norm(len(weight), _address(weight), _address(bias), _address(shift), epsilon)


def prefix_lengths(keep: Tensor) -> list[int] | None:
    """Tokens of each sentence of ``keep`` (batch, length), booleans on the CPU; None if one is empty, has a gap or does
    not start its row."""
    keep = keep.contiguous()
    return module().prefix_lengths(keep.data_ptr(), *keep.shape)


class Embeddings:
    """LayerNorm(word + position + token type) of token ids, which an encoder adds up itself.

    Tables are read where they are, and kept.

    Args:
        words: (vocabulary, width) float32, or int8 with the ``scale`` (vocabulary,) of each row.
        positions: (positions, width) float32.
        norm: of this module's ``norm``.
        types: (types, width) float32, or None where there are none.
        scale: of int8 words.
        up: of this module's ``linear``, where rows of ``words`` are factors (vocabulary, rank).
        padding: RoBERTa's padding id: all other tokens are counted from the position behind it. -1 to count all from 0.

    Raises:
        ValueError: a table has another dtype, or there is not one scale for each int8 word.
    """

    def __init__(
        self,
        words: Tensor,
        positions: Tensor,
        norm: Any,
        types: Tensor | None = None,
        scale: Tensor | None = None,
        up: Any = None,
        padding: int = -1,
    ):
        words, scale = words.detach().contiguous(), _floats(scale)
        places = [None if one is None else one.detach().contiguous() for one in (positions, types)]
        dtypes = [torch.float32 if scale is None else torch.int8, torch.float32, torch.float32]
        if any(
            one is not None and (one.ndim, one.dtype) != (2, dtype)
            for one, dtype in zip((words, *places), dtypes, strict=True)
        ) or (scale is not None and scale.shape != words.shape[:1]):
            raise ValueError("embeddings are float32, or int8 words with a scale each")
        self.has_types = types is not None
        self._kept = words, scale, places
        described = [None if one is None else _matrix(one) for one in (words, *places)]
        self.native = module().Embeddings(
            described[0], _address(scale), *described[1:], up, norm, padding
        )


class Encoder:
    """Layers that normalise after each half, as one call on the real tokens of a batch.

    Args:
        level: one of ``levels()``; every part of the layers was made for it.
        width: of the hidden states.
        layers: ``_cpu.Layer`` objects; their parts are those of this module's functions.
        embeddings: what makes the first layer's input of token ids, or None.
    """

    def __init__(
        self, level: str, width: int, layers: Sequence[Any], embeddings: Embeddings | None = None
    ):
        self.width, self.embeddings = width, embeddings
        self.last_head = max((head for layer in layers for head in layer.kept), default=-1)
        native = None if embeddings is None else embeddings.native
        self._native = module().Encoder(level, width, list(layers), native)

    def __call__(
        self,
        hidden: Tensor,
        lengths: list[int],
        bias: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """(batch, length, width), zeros behind each sentence; (batch, 1, width) of first tokens.

        Args:
            hidden: (batch, length, width) on the CPU, what the first layer reads.
            lengths: tokens of each sentence, at the start of its row.
            bias: (1, heads, length, length), added to the scores, or None.
            first_only: whether the last layer's result is wanted of first tokens only.

        Raises:
            ValueError: the sizes contradict each other.
        """
        if hidden.ndim != 3 or hidden.shape[2] != self.width:
            raise ValueError(f"hidden is {tuple(hidden.shape)}, the width {self.width}")
        # Not what autocast or a caller made of it: addresses go in.
        hidden = hidden.detach().float().contiguous()
        return self._run(hidden.shape[:2], lengths, bias, first_only, hidden=hidden)

    def from_ids(
        self,
        ids: Tensor,
        lengths: list[int],
        types: Tensor | None = None,
        bias: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """The same of token ids and types, (batch, length) on the CPU, by the encoder's ``embeddings``.

        Raises:
            ValueError: the sizes contradict each other, or there are no embeddings.
            IndexError: a token within ``lengths`` is not in a table.
        """
        if self.embeddings is None or (types is not None and not self.embeddings.has_types):
            raise ValueError("the encoder has no embeddings for these inputs")
        if ids.ndim != 2 or (types is not None and types.shape != ids.shape):
            shape = None if types is None else tuple(types.shape)
            raise ValueError(f"ids are {tuple(ids.shape)}, types {shape}")
        ids = ids.long().contiguous()
        types = None if types is None else types.long().contiguous()
        return self._run(ids.shape, lengths, bias, first_only, ids=ids, types=types)

    def _run(
        self,
        shape: Sequence[int],
        lengths: list[int],
        bias: Tensor | None,
        first_only: bool,
        hidden: Tensor | None = None,
        ids: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        batch, length = shape
        if len(lengths) != batch or not all(0 <= n <= length for n in lengths):
            raise ValueError(f"the batch is {(batch, length)}, the lengths {lengths}")
        if bias is not None and (
            bias.shape[-2:] != (length, length) or bias.shape[1] <= self.last_head
        ):
            raise ValueError(f"bias is {tuple(bias.shape)}, the length {length}")
        bias = _floats(bias)
        result = torch.empty(batch, 1 if first_only else length, self.width)
        self._native.run(
            _address(hidden),
            _address(ids),
            _address(types),
            lengths,
            length,
            _address(bias),
            first_only,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result
