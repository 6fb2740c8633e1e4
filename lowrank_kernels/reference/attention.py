"""``attention`` of rows within their sentences by library calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def varlen_of(device: torch.device) -> Callable[..., Any] | None:
    """torch's ``varlen_attn``, or None where it does not run."""
    # FlashAttention's kernels are for compute capability 8.0 and later.
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_for(query: Tensor, value: Tensor) -> Callable[..., Any] | None:
    """``varlen_of``, where that takes such queries and values (rows, width)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return varlen_of(query.device) if half and query.shape[-1] == value.shape[-1] else None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *where: Any
) -> Tensor | None:
    """``attention`` by torch's kernel for sentences of any length; None where that does not take such tensors.

    ``where`` has ``asking``, ``bounds``, ``most_asking`` and ``longest``.
    """
    kernel = varlen_for(query, value)
    if kernel is None:
        return None
    split = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))
    return kernel(*split, *where).flatten(-2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asking: Tensor,
    bounds: Tensor,
    most_asking: int,
    longest: int,
    heads: int,
) -> tuple[Tensor, None, None]:
    """softmax(query key^T / sqrt(score size)) value, by heads and within sentences.

    Where torch's kernel for sentences of any length does not serve, they are padded to the longest and masked.

    Args:
        query: (rows, heads * score size).
        key, value: (rows of keys, heads * score size), (rows of keys, heads * value size).
        asking, bounds: (sentences + 1,), int32: where each sentence's queries and keys begin, and where the last end.
        most_asking, longest: queries and keys of a sentence, at most.
        heads: how many the columns are split into.

    Returns:
        (rows, heads * value size), and nothing that a backward pass would want.
    """
    context = varlen_attention(query, key, value, heads, asking, bounds, most_asking, longest)
    if context is not None:
        return context, None, None
    rows, in_row = _padded(asking, most_asking, len(query))
    key_rows, in_key_row = _padded(bounds, longest, len(key))
    # Zeros for padding: the next sentence stands there, and may hold NaN.
    q, k, v = (
        x[index.clamp_max(max(len(x) - 1, 0))]
        .masked_fill(~own[..., None], 0)
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for x, index, own in (
            (query, rows, in_row),
            (key, key_rows, in_key_row),
            (value, key_rows, in_key_row),
        )
    )
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=in_key_row[:, None, None, :])
    context = context.transpose(1, 2).flatten(-2)
    # Rows that are padding go to one more row, which is left out.
    result = context.new_empty(len(query) + 1, context.shape[-1])
    result[torch.where(in_row, rows, len(query))] = context
    return result[:-1], None, None


def _padded(bounds: Tensor, longest: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers (sentences, longest), and which of them are the sentence's own."""
    index = bounds[:-1, None] + torch.arange(longest, device=bounds.device)
    return index.long(), index < bounds[1:, None]
