"""How the tokens of a batch lie in memory while they go through the layers, and attention over them.

``Padded`` keeps a batch as it came. ``Packed`` drops padding: the real tokens of all sentences stand in one matrix,
shortest sentence first, so that sentences of one length are neighbours and their attention is one library call on a
view, without mask or copy. On a GPU one variable-length kernel serves all of them where torch has it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Sequences(Protocol):
    """The tokens of a batch as rows, for layers that treat each row alike."""

    def rows(self, hidden: Tensor) -> Tensor:
        """The matrix (rows, width) that the layers work on, from the batch (batch, length, width)."""

    def first(self) -> Tensor | slice:
        """Which rows are the sentences' first tokens."""

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
    ) -> Tensor:
        """Attention of rows within their sentences; ``query`` may have one row a sentence. ``bias``: (1, heads, length,
        length), added to the scores."""

    def batch(self, rows: Tensor) -> Tensor:
        """The way back: (batch, length, width), zeros where there was padding; length 1 if a sentence has one row."""


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
class Padded:
    """All tokens, padding included; ``keep`` (batch, length) is None if none is padding."""

    shape: tuple[int, int]
    keep: Tensor | None

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1])

    def first(self) -> slice:
        return slice(None, None, self.shape[1])

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
    ) -> Tensor:
        queries = len(query) // max(self.shape[0], 1)
        mask = None if self.keep is None else self.keep[:, None, None, :]
        if bias is not None:
            bias = bias[:, :, :queries]
            mask = bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return _attend(query, key, value, self.shape[0], heads, mask)

    def batch(self, rows: Tensor) -> Tensor:
        return rows.view(self.shape[0], len(rows) // max(self.shape[0], 1), -1)


class Packed:
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

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
    ) -> Tensor:
        one_each = len(query) == len(self.starts) != len(key)
        if (
            bias is None
            and self._varlen is not None
            and query.dtype in (torch.float16, torch.bfloat16)
            and query.shape[-1] == value.shape[-1]
        ):
            return self._one_kernel(query, key, value, heads, one_each)
        parts, row, sentence = [], 0, 0
        for length, count in self.groups:
            tokens = slice(row, row + length * count)
            asking = slice(sentence, sentence + count) if one_each else tokens
            mask = None if bias is None else bias[:, :, : 1 if one_each else length, :length]
            parts.append(_attend(query[asking], key[tokens], value[tokens], count, heads, mask))
            row, sentence = row + length * count, sentence + count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def _varlen(self):
        """torch's variable-length attention, or None where it does not run."""
        if not self.index.is_cuda:
            return None
        # FlashAttention's kernels are for compute capability 8.0 and later.
        if torch.cuda.get_device_capability(self.index.device) < (8, 0):
            return None
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return None
        return varlen_attn

    @cached_property
    def _bounds(self) -> Tensor:
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    def _one_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, one_each: bool
    ) -> Tensor:
        split = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))
        asking = (
            torch.arange(len(query) + 1, device=query.device, dtype=torch.int32)
            if one_each
            else self._bounds
        )
        return self._varlen(
            *split, asking, self._bounds, 1 if one_each else self.longest, self.longest
        ).flatten(-2)

    def batch(self, rows: Tensor) -> Tensor:
        if len(rows) == len(self.order) != len(self.index):
            return torch.empty_like(rows).index_copy_(0, self.order, rows)[:, None]
        flat = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[-1])
        return flat.index_copy_(0, self.index, rows).view(*self.shape, -1)


def pack(keep: Tensor) -> Packed | None:
    """A batch without its padding; None if a sentence does not start its row or has a gap.

    What decides the shapes is asked for in one go: on a GPU that is the only time the host waits for it.

    Args:
        keep: (batch, length), true for real tokens.
    """
    if not keep.numel():
        return None
    lengths, order = keep.sum(1).sort()
    starts_and_has_no_gap = keep[:, 0].all() & (keep[:, 1:] <= keep[:, :-1]).all()
    asked = torch.stack([starts_and_has_no_gap.long(), lengths.sum(), lengths[-1]])
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


def real_lengths(hidden: Tensor, mask: Tensor | None, unpad: bool) -> list[int] | None:
    """Tokens of each sentence of a batch as ``arrange`` takes it, or None where padding is to stay."""
    if mask is None:
        return [hidden.shape[1]] * hidden.shape[0]
    keep = _kept(mask)
    lengths = keep.sum(1)
    positions = torch.arange(keep.shape[1], device=keep.device)
    # An empty sentence has no first token that a head could read.
    if not unpad or not torch.equal(keep, positions < lengths.clamp_min(1)[:, None]):
        return None
    return lengths.tolist()


def arrange(hidden: Tensor, mask: Tensor | None, unpad: bool) -> Sequences:
    """Lay out a batch.

    Args:
        hidden: (batch, length, width).
        mask: what transformers hands to an encoder: None for no padding; (batch, length), not 0 for real tokens; or
            that expanded to (batch, 1, length, length), boolean, or added to the scores.
        unpad: drop padding where that is exact: where each sentence starts its row and has no gap.
    """
    shape = (hidden.shape[0], hidden.shape[1])
    if mask is None:
        return Padded(shape, None)
    keep = _kept(mask)
    # While tracing, the number of real tokens is not known.
    packed = pack(keep) if unpad and not torch.compiler.is_compiling() else None
    return Padded(shape, keep) if packed is None else packed
