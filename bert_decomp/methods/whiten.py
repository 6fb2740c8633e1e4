"""``whiten``: the best rank-r approximation of what the layer computes, E|(W - W_hat) x|^2, not of its weight.

DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (arXiv 2403.07378) reach the same minimum through a factor of the second
moment and its inverse. Neither is needed: with C the covariance of x, the minimiser projects onto U_r, the leading
eigenvectors of W C W^T, so up = U_r and down = U_r^T W. Using the covariance instead of the second moment is right once
the bias takes over the mean: b' = b + (W - W_hat) mu (the centred form, Yu and Wu, AAAI 2023). It costs no parameter and
its error is never larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import InputStatistics
from . import Factors, Method, balanced, register_method

# Relative to the mean variance: directions that calibration never showed keep a little weight, so that they are dropped
# in the order of the weight itself and full rank reproduces the layer exactly.
RIDGE = 1e-6


def _leading(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """Left singular vectors (out, k) and values (k,), falling, of W C^(1/2); k = min(out, in).

    Works on the smaller side of the weight: its eigendecomposition is what costs.
    """
    out_features, in_features = weight.shape
    covariance = statistics.covariance
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    if out_features <= in_features:
        values, vectors = torch.linalg.eigh(weight @ covariance @ weight.T + ridge * (weight @ weight.T))
        return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
    # An eigendecomposition, since rounding makes some covariances indefinite and a Cholesky factor needs more.
    variances, directions = torch.linalg.eigh(covariance)
    half = weight @ (directions * (variances.clamp_min(0) + ridge).sqrt())
    values, vectors = torch.linalg.eigh(half.T @ half)
    values = values.flip(0).clamp_min(0).sqrt()
    # Orthonormal even where singular values vanish, which dividing by them would not be.
    return torch.linalg.qr(half @ vectors.flip(1)).Q, values


def factor(weight: Tensor, bias: Tensor | None, statistics: InputStatistics, rank: int) -> Factors:
    """up = U_r, down = U_r^T W, then balanced; the bias takes the mean of what is dropped (and is made if absent)."""
    up = _leading(weight, statistics)[0][:, :rank]
    down = up.T @ weight
    dropped = weight @ statistics.mean - up @ (down @ statistics.mean)
    return *balanced(down, up), dropped if bias is None else bias + dropped


def spectrum(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Singular values of W C^(1/2), falling."""
    return _leading(weight, statistics)[1]


register_method("whiten", Method(factor, spectrum, needs_inputs=True))
