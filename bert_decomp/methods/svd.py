"""``svd``: the best rank-r approximation of the weight itself (Eckart and Young, 1936), as the paper uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import InputStatistics
from . import Factors, Method, register_method


def factor(weight: Tensor, bias: Tensor | None, statistics: InputStatistics | None, rank: int) -> Factors:
    """W = U s V^T; down = sqrt(s_r) V_r^T, up = U_r sqrt(s_r). Statistics are not used."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root, bias


def spectrum(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """Singular values of the weight, falling."""
    return torch.linalg.svdvals(weight)


register_method("svd", Method(factor, spectrum, needs_inputs=False))
