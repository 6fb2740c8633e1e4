"""``Problem``: one call of an operator as backends and tuning tables see it."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Ranks are tiled, measured and looked up by class: the smallest of these that holds the rank.
RANK_CLASSES = (64, 96, 128, 192, 256, 384, 512)

# Tokens of a sentence where attention is measured.
SENTENCE = 128


class Problem(NamedTuple):
    """The sizes of one call.

    ``rank``, ``inner`` and ``outer`` are the largest of the operator's factor pairs; ``hidden`` is the number of
    neurons of a feed-forward and 0 elsewhere. Attention has no factors: ``inner`` and ``outer`` are the widths of its
    queries and values, ``hidden`` its heads.

    >>> Problem("linear", rows=8, inner=768, outer=3072, rank=192, dtype=torch.float32).hidden
    0
    """

    operator: str
    rows: int
    inner: int
    outer: int
    rank: int
    dtype: torch.dtype
    hidden: int = 0
