"""The runtime form of a factor pair: its rank padded with zeros, so that every row starts on a 16-byte boundary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RANK_MULTIPLE = 16


def pad_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Pad a factor pair with zeros to a rank that is a multiple of 16; a fitting pair is returned as is."""
    extra = -down.shape[0] % RANK_MULTIPLE
    if extra == 0:
        return down, up
    return F.pad(down, (0, 0, 0, extra)), F.pad(up, (0, extra))


@torch.no_grad()
def align_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The runtime form of a factor pair: contiguous, detached, rank padded with zeros to a multiple of 16.

    down (rank, in), up (out, rank) -> down (padded, in), up (out, padded). It stands for the same matrix and is never
    saved. A row of x that holds Inf may come out as NaN where the unpadded factors give Inf (0 * Inf).

    >>> down, up = align_factors(torch.ones(5, 8), torch.ones(12, 5))
    >>> down.shape, up.shape
    (torch.Size([16, 8]), torch.Size([12, 16]))
    """
    down, up = pad_rank(down.detach(), up.detach())
    return down.contiguous(), up.contiguous()
