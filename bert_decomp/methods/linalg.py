"""The best rank-r approximation of a weight under a two-sided quadratic loss.

    loss(W_hat) = tr(G (W - W_hat) S (W - W_hat)^T)

With S = L_S L_S^T and G = L_G L_G^T it is the Frobenius norm of L_G^T (W - W_hat) L_S, which the singular value
decomposition minimises (Eckart and Young, 1936). ``solve`` gets there through one symmetric eigenproblem of the smaller
side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to a matrix's mean diagonal: directions that calibration never showed keep a little weight, so that they are
# dropped in the order of the weight itself and full rank reproduces the layer exactly.
RIDGE = 1e-6


@dataclass(frozen=True)
class Metric:
    """The loss of one layer's approximation: ``inputs`` S (n, n), ``outputs`` G (m, m), ``mean`` mu (n,); None stands
    for the identity, or for no mean."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    mean: Tensor | None = None


def solve(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of G^(1/2) W S^(1/2), and the optimal ``up`` (m, rank) and ``down`` (rank, n) under ``metric``.

    With m <= n, G = L L^T and U the eigenvectors of L^T W S W^T L:  up = L^-T U_r, down = U_r^T L^T W; S needs no
    factor and no inverse. Otherwise the transpose of the same: S = L L^T, V the eigenvectors of L^T W^T G W L,
    up = W L V_r, down = V_r^T L^-1.

    >>> values, up, down = solve(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Metric(), rank=2)
    >>> values
    tensor([3., 2., 1.])
    >>> (up @ down).diagonal()
    tensor([3., 2., 0.])

    Args:
        weight: (m, n), float64 where accuracy matters.
        rank: 0 computes the singular values alone, in a third of the time.

    Returns:
        The singular values (min(m, n),), falling, ``up`` and ``down``.
    """
    if weight.shape[0] > weight.shape[1]:
        values, down, up = solve(weight.T, Metric(metric.outputs, metric.inputs), rank)
        return values, up.T, down.T
    factor = None if metric.outputs is None else cholesky(metric.outputs)
    half = weight if factor is None else factor.T @ weight
    gram = (half if metric.inputs is None else half @ metric.inputs) @ half.T
    if rank == 0:
        values, vectors = torch.linalg.eigvalsh(gram), gram[:, :0]
    else:
        values, vectors = torch.linalg.eigh(gram)
    leading = vectors.flip(1)[:, :rank]
    up = leading if factor is None else torch.linalg.solve_triangular(factor.T, leading, upper=True)
    return values.flip(0).clamp_min(0).sqrt(), up, leading.T @ half


def ridged(matrix: Tensor, share: float = RIDGE) -> Tensor:
    """``matrix`` plus ``share`` of its mean diagonal on the diagonal, so that it has a Cholesky factor.

    >>> ridged(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 0.5)
    tensor([[5., 0.],
            [0., 1.]])
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + share * matrix.diagonal().mean().clamp_min(1e-30) * identity


def shrunk(matrix: Tensor, share: float) -> Tensor:
    """(1 - share) matrix + share mean(diag) I: what few tokens say of rare directions is drawn towards the average.

    >>> shrunk(torch.tensor([[4.0, 2.0], [2.0, 0.0]]), 0.5)
    tensor([[3., 1.],
            [1., 1.]])
    """
    return ridged((1 - share) * matrix, share / (1 - share))


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor, with as little more on the diagonal as it takes: rounding makes some covariances
    indefinite.

    >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    tensor([[2., 0.],
            [1., 2.]])
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    share = RIDGE
    while failed:
        factor, failed = torch.linalg.cholesky_ex(ridged(matrix, share))
        share *= 10
    return factor


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row of ``down`` (rank, n) and column of ``up`` (m, rank) to one norm; their product stays.

    Equal norms train better and stay in half-precision range.

    >>> balanced(torch.tensor([[8.0]]), torch.tensor([[2.0]]))
    (tensor([[4.]]), tensor([[4.]]))
    """
    norm_down, norm_up = down.norm(dim=1), up.norm(dim=0)
    scale = (norm_down / norm_up.clamp_min(1e-300)).sqrt()
    # A pair with a zero contributes nothing whatever its scale.
    scale = scale.where((norm_down > 0) & (norm_up > 0), scale.new_ones(()))
    return down / scale[:, None], up * scale
