"""How the tokens of a batch lie in memory while they go through the layers, and attention over them.

``Padded`` keeps a batch as it came. ``Packed`` drops padding: the real tokens of all sentences stand in one matrix,
shortest sentence first, so that sentences of one length are neighbours and their attention is one library call on a
view, without mask or copy. On a GPU one variable-length kernel serves all of them where torch has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_kernels import cpu
from lowrank_kernels.reference.attention import varlen_attention, varlen_for


class Fused(Protocol):
    """Attention within sentences in one kernel; see ``lowrank_kernels.inference.prepare_attention``. None where it is
    not the choice."""

    def __call__(self, query: Tensor, /, *rest: Any) -> Tensor | None: ...


# Where each sentence's queries and keys begin, and the most that a sentence has of each.
Where = tuple[Tensor, Tensor, int, int]


class Sequences(ABC):
    """The tokens of a batch as rows, for layers that treat each row alike."""

    @abstractmethod
    def rows(self, hidden: Tensor) -> Tensor:
        """The matrix (rows, width) that the layers work on, from the batch (batch, length, width)."""

    @abstractmethod
    def first(self) -> Tensor | slice:
        """Which rows are the sentences' first tokens."""

    @abstractmethod
    def batch(self, rows: Tensor) -> Tensor:
        """The way back: (batch, length, width), zeros where there was padding; length 1 if a sentence has one row."""

    @property
    @abstractmethod
    def in_one_kernel(self) -> bool:
        """Whether a kernel that is told where sentences begin can do without a mask."""

    @property
    @abstractmethod
    def of_one_length(self) -> bool:
        """Whether a library call serves all sentences at once, without a mask."""

    @abstractmethod
    def where(self, query: Tensor, key: Tensor) -> Where:
        """Where the sentences begin in the rows of queries and keys."""

    @abstractmethod
    def by_library(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None
    ) -> Tensor:
        """``attention`` by ``scaled_dot_product_attention``."""

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        bias: Tensor | None = None,
        fused: Fused | None = None,
    ) -> Tensor:
        """Attention of rows within their sentences; ``query`` may have one row a sentence.

        ``bias``, (1, heads, length, length), is added to the scores. ``fused`` is asked first, where it serves.
        """
        if bias is None and self.in_one_kernel:
            varlen = not self.of_one_length and varlen_for(query, value) is not None
            where = self.where(query, key) if fused is not None or varlen else None
            context = None
            if fused is not None and where is not None:
                context = fused(query, key, value, *where)
            if context is None and varlen and where is not None:
                context = varlen_attention(query, key, value, heads, *where)
            if context is not None:
                return context
        return self.by_library(query, key, value, heads, bias)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sentences: int, heads: int, mask: Tensor | None
) -> Tensor:
    """``scaled_dot_product_attention`` over (sentences * length, width) matrices; ``value`` may have another width."""
    query, key, value = (
        x.view(sentences, len(x) // max(sentences, 1), heads, -1).transpose(1, 2)
        for x in (query, key, value)
    )
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    return context.flatten(-2).flatten(0, 1)


@dataclass
class Padded(Sequences):
    """All tokens, padding included.

    Attributes:
        shape: (batch, length).
        device: where the tokens are.
        keep: (batch, length), true for real tokens; None if none is padding.
        prefix: whether each sentence is known to start its row and to have no gap.
    """

    shape: tuple[int, int]
    device: torch.device
    keep: Tensor | None
    prefix: bool = False

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1])

    def first(self) -> slice:
        return slice(None, None, self.shape[1])

    @property
    def in_one_kernel(self) -> bool:
        return (self.keep is None or self.prefix) and not torch.compiler.is_compiling()

    @property
    def of_one_length(self) -> bool:
        return self.keep is None

    def by_library(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None
    ) -> Tensor:
        mask = None if self.keep is None else self.keep[:, None, None, :]
        if bias is not None:
            bias = bias[:, :, : len(query) // max(self.shape[0], 1)]
            mask = bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return _attend(query, key, value, self.shape[0], heads, mask)

    @cached_property
    def _bounds(self) -> Tensor:
        """Where sentences begin; with padding, real tokens and padding in turn: it attends to itself, and no mask is
        needed."""
        batch, length = self.shape
        if self.keep is None:
            return torch.arange(batch + 1, device=self.device, dtype=torch.int32) * length
        starts = torch.arange(batch, device=self.device) * length
        pairs = torch.stack([starts, starts + self.keep.sum(1)], 1).flatten()
        return F.pad(pairs, (0, 1), value=batch * length).int()

    def where(self, query: Tensor, key: Tensor) -> Where:
        batch, length = self.shape
        queries, asking = len(query) // max(batch, 1), self._bounds
        if queries != length:
            # One a sentence: the padding asks nothing.
            parts = 1 if self.keep is None else 2
            asking = torch.arange(parts * batch + 1, device=self.device, dtype=torch.int32)
            asking = asking if parts == 1 else (asking + 1) // 2
        return asking, self._bounds, queries, length

    def batch(self, rows: Tensor) -> Tensor:
        return rows.view(self.shape[0], len(rows) // max(self.shape[0], 1), -1)


class Packed(Sequences):
    """Real tokens only; ``pack`` makes it.

    Args:
        shape: (batch, length) of the batch.
        order, lengths: sentences by length, and their lengths in that order.
        total, longest: the lengths' sum and the last of them.
    """

    def __init__(
        self, shape: tuple[int, int], order: Tensor, lengths: Tensor, total: int, longest: int
    ):
        self.shape, self.order, self.lengths, self.longest = shape, order, lengths, longest
        self.starts = lengths.cumsum(0) - lengths
        # Where each packed token stands in the flattened batch.
        before = order * shape[1] - self.starts
        within = torch.arange(total, device=order.device)
        self.index = before.repeat_interleave(lengths, output_size=total) + within

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Lengths and how many sentences have each, for where no kernel takes sentences of any length."""
        counts = Counter(self.lengths.tolist())
        return sorted(counts.items())

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1])[self.index]

    def first(self) -> Tensor:
        return self.starts

    @property
    def in_one_kernel(self) -> bool:
        return True

    @property
    def of_one_length(self) -> bool:
        return False

    def _one_each(self, query: Tensor, key: Tensor) -> bool:
        """Whether each sentence asks with its first token alone."""
        return len(query) == len(self.starts) != len(key)

    def by_library(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None
    ) -> Tensor:
        one_each = self._one_each(query, key)
        parts, row, sentence = [], 0, 0
        for length, count in self.groups:
            tokens = slice(row, row + length * count)
            asking = slice(sentence, sentence + count) if one_each else tokens
            mask = None if bias is None else bias[:, :, : 1 if one_each else length, :length]
            parts.append(_attend(query[asking], key[tokens], value[tokens], count, heads, mask))
            row, sentence = row + length * count, sentence + count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def _bounds(self) -> Tensor:
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    def where(self, query: Tensor, key: Tensor) -> Where:
        if not self._one_each(query, key):
            return self._bounds, self._bounds, self.longest, self.longest
        asking = torch.arange(len(self.starts) + 1, device=self.starts.device, dtype=torch.int32)
        return asking, self._bounds, 1, self.longest

    def batch(self, rows: Tensor) -> Tensor:
        if len(rows) == len(self.order) != len(self.index):
            return torch.empty_like(rows).index_copy_(0, self.order, rows)[:, None]
        flat = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[-1])
        return flat.index_copy_(0, self.index, rows).view(*self.shape, -1)


def is_prefix(keep: Tensor) -> Tensor:
    """Whether each sentence of ``keep`` (batch, length) starts its row and has no gap: one boolean, on its device.

    An empty sentence does not: it has no first token that a head could read.
    """
    return keep[:, :1].all() & (keep[:, 1:] <= keep[:, :-1]).all()


def pack(keep: Tensor) -> Packed | None:
    """A batch without its padding; None if a sentence does not start its row or has a gap.

    What decides the shapes is asked for in one go: on a GPU that is the only time the host waits for it.

    Args:
        keep: (batch, length), true for real tokens.
    """
    if not keep.numel():
        return None
    lengths, order = keep.sum(1).sort()
    asked = torch.stack([is_prefix(keep).long(), lengths.sum(), lengths[-1]])
    packable, total, longest = asked.tolist()
    if not packable:
        return None
    return Packed((keep.shape[0], keep.shape[1]), order, lengths, total, longest)


def _kept(mask: Tensor) -> Tensor:
    """(batch, length), True for real tokens, of a mask as ``arrange`` takes it."""
    if mask.ndim == 4:
        mask = mask[:, 0, 0, :]
        return mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()


def real_lengths(shape: Sequence[int], mask: Tensor | None, unpad: bool) -> list[int] | None:
    """Tokens of each sentence of a batch (batch, length, ...) with a mask as ``arrange`` takes it, for the compiled
    kernels, or None where padding is to stay."""
    if mask is None:
        return [shape[1]] * shape[0]
    return cpu.prefix_lengths(_kept(mask)) if unpad else None


def arrange(hidden: Tensor, mask: Tensor | None, unpad: bool, prefix: bool = False) -> Sequences:
    """Lay out a batch.

    Args:
        hidden: (batch, length, width).
        mask: what transformers hands to an encoder: None for no padding; (batch, length), not 0 for real tokens; or
            that expanded to (batch, 1, length, length), boolean, or added to the scores.
        unpad: drop padding where that is exact: where each sentence starts its row and has no gap.
        prefix: whether that is known already.
    """
    shape = (hidden.shape[0], hidden.shape[1])
    if mask is None:
        return Padded(shape, hidden.device, None)
    keep = _kept(mask)
    # While tracing, the number of real tokens is not known.
    packed = pack(keep) if unpad and not torch.compiler.is_compiling() else None
    return Padded(shape, hidden.device, keep, prefix) if packed is None else packed
