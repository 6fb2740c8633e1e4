"""Decomposition methods: one file each, registered under the name that options, tests and tables use.

Every method here is the best rank-r approximation of a weight under a loss of one form,

    loss(W_hat) = tr(G (W - W_hat) S (W - W_hat)^T),        b' = b + (W - W_hat) mu

and says only which ``S`` (how inputs vary), ``G`` (how much outputs matter) and ``mu`` it takes from the statistics.
``factor`` solves it, working on the smaller side of the weight, whose eigendecomposition is what costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..statistics import LayerStatistics

Factors = tuple[Tensor, Tensor, "Tensor | None"]

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


@dataclass(frozen=True)
class Drift:
    """How inputs x' of a compressed network differ from the dense model's x: ``difference`` Cov(x, x') - Cov(x') (n, n),
    and ``mean`` E[x] (n,)."""

    difference: Tensor
    mean: Tensor


# Where the moments of the inputs are, by the part of a layer's statistics that they belong to.
_INPUT_MOMENTS = {
    "inputs": ("second_moment", "mean"),
    "gradients": ("input_second_moment", "input_mean"),
}


@dataclass(frozen=True)
class Method:
    """A registered method: ``metric`` makes the loss from a layer's statistics, of which ``needs`` must be there.

    ``anchor`` is the part of them ("inputs", or "gradients" if tokens are weighted) whose moments of the inputs can be
    those of a compressed network instead (see ``anchored``), None if the method has no such form; ``shrink`` is the share
    by which ``metric`` shrinks their covariance.
    """

    metric: Callable[[LayerStatistics], Metric]
    needs: tuple[str, ...] = ()
    anchor: str | None = None
    shrink: float = 0.0

    def moved(
        self, statistics: LayerStatistics, second_moment: Tensor, mean: Tensor
    ) -> LayerStatistics:
        """``statistics`` with other moments of the inputs."""
        part = getattr(statistics, self.anchor)
        return replace(
            statistics,
            **{
                self.anchor: replace(
                    part, **dict(zip(_INPUT_MOMENTS[self.anchor], (second_moment, mean)))
                )
            },
        )

    def factor(
        self,
        weight: Tensor,
        bias: Tensor | None,
        statistics: LayerStatistics,
        rank: int,
        drift: Drift | None = None,
    ) -> Factors:
        """Cut ``weight`` (out, in) to ``rank``.

        Args:
            drift: if ``statistics`` are of inputs x' in a compressed network, how these differ from the dense model's x;
                the factors then answer x' as the dense layer answers x.

        Returns:
            ``down`` (rank, in), ``up`` (out, rank) and the bias (out,), made if the method moves a mean into it; float64.
        """
        weight, metric = weight.double(), self.metric(statistics)
        target = weight if drift is None else weight + self._correction(weight, metric, drift)
        _, up, down = solve(target, metric, rank)
        if metric.mean is not None:
            dropped = weight @ (metric.mean if drift is None else drift.mean) - up @ (
                down @ metric.mean
            )
            bias = dropped if bias is None else bias.double() + dropped
        return *balanced(down, up), bias

    def _correction(self, weight: Tensor, metric: Metric, drift: Drift) -> Tensor:
        """What is added to ``weight`` to make it the best dense answer to x'.

        With the covariance shrunk to S' + l I, E|W x - A x'|^2 + l |W - A|^2 is least at A = W (Cov(x, x') + l I)
        (S' + l I)^-1, which is W + W (Cov(x, x') - S') (S' + l I)^-1: nothing is added where nothing drifted.
        """
        factor = _cholesky(metric.inputs)
        return (1 - self.shrink) * torch.cholesky_solve(drift.difference.T @ weight.T, factor).T

    def spectrum(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """Singular values (min(out, in),), falling: the loss at rank r is the sum of their squares from the r-th on."""
        return solve(weight.double(), self.metric(statistics), 0)[0]


def ridged(matrix: Tensor, share: float = RIDGE) -> Tensor:
    """``matrix`` plus ``share`` of its mean diagonal on the diagonal, so that it has a Cholesky factor."""
    return matrix + share * matrix.diagonal().mean().clamp_min(1e-30) * torch.eye(
        len(matrix), dtype=matrix.dtype, device=matrix.device
    )


def shrunk(matrix: Tensor, share: float) -> Tensor:
    """(1 - share) matrix + share mean(diag) I: what few tokens say of rare directions is drawn towards the average."""
    return ridged((1 - share) * matrix, share / (1 - share))


def _cholesky(matrix: Tensor) -> Tensor:
    """The Cholesky factor, with as little more on the diagonal as it takes: rounding makes some covariances indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    share = RIDGE
    while failed:
        factor, failed = torch.linalg.cholesky_ex(ridged(matrix, share))
        share *= 10
    return factor


def solve(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of G^(1/2) W S^(1/2), and the optimal ``up`` (m, rank) and ``down`` (rank, n) under ``metric``.

    With m <= n, G = L L^T and U the eigenvectors of L^T W S W^T L:  up = L^-T U_r, down = U_r^T L^T W; S needs no factor
    and no inverse. Otherwise the transpose of the same: S = L L^T, V the eigenvectors of L^T W^T G W L, up = W L V_r,
    down = V_r^T L^-1.
    """
    if weight.shape[0] > weight.shape[1]:
        values, down, up = solve(weight.T, Metric(metric.outputs, metric.inputs), rank)
        return values, up.T, down.T
    factor = None if metric.outputs is None else _cholesky(metric.outputs)
    half = weight if factor is None else factor.T @ weight
    gram = (half if metric.inputs is None else half @ metric.inputs) @ half.T
    if rank == 0:
        # Values alone cost a third.
        values, vectors = torch.linalg.eigvalsh(gram), gram[:, :0]
    else:
        values, vectors = torch.linalg.eigh(gram)
    leading = vectors.flip(1)[:, :rank]
    up = leading if factor is None else torch.linalg.solve_triangular(factor.T, leading, upper=True)
    return values.flip(0).clamp_min(0).sqrt(), up, leading.T @ half


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> Method:
    """Make ``method`` selectable as ``--method name``."""
    METHODS[name] = method
    return method


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row of ``down`` and column of ``up`` to one norm; their product stays.

    Equal norms train better and stay in half-precision range.
    """
    of_down, of_up = down.norm(dim=1), up.norm(dim=0)
    scale = (of_down / of_up.clamp_min(1e-300)).sqrt()
    # A pair with a zero contributes nothing whatever its scale.
    scale = scale.where((of_down > 0) & (of_up > 0), scale.new_ones(()))
    return down / scale[:, None], up * scale


from . import asvd, coupled, fwsvd, kfac, svd, whiten  # noqa: E402, F401  (they register themselves)
