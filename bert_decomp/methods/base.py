"""What a method is, the registry of methods by name, and the layer that a method makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..statistics import LayerStatistics, collected
from .linalg import Metric, balanced, cholesky, solve

Factors = tuple[Tensor, Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Drift:
    """How inputs x' of a compressed network differ from the dense model's x: ``mean`` E[x] (n,), and
    ``difference`` Cov(x, x') - Cov(x') (n, n)."""

    difference: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Method:
    """A registered method: ``metric`` makes the loss from a layer's statistics, of which ``needs`` must be there.

    ``anchor`` is the part of them ("inputs", or "gradients" if tokens are weighted) whose moments of the inputs can be
    those of a compressed network instead (see ``decomposition.anchored``), None if the method has no such form;
    ``shrink`` is the share by which ``metric`` shrinks their covariance.
    """

    metric: Callable[[LayerStatistics], Metric]
    needs: tuple[str, ...] = ()
    anchor: str | None = None
    shrink: float = 0.0

    def with_input_moments(
        self, statistics: LayerStatistics, second_moment: Tensor, mean: Tensor
    ) -> LayerStatistics:
        """``statistics`` with other moments of the inputs: ``second_moment`` (n, n) and ``mean`` (n,)."""
        if self.anchor == "inputs":
            inputs = replace(collected(statistics.inputs), second_moment=second_moment, mean=mean)
            return replace(statistics, inputs=inputs)
        gradients = replace(
            collected(statistics.gradients), input_second_moment=second_moment, input_mean=mean
        )
        return replace(statistics, gradients=gradients)

    def factor(
        self,
        weight: Tensor,
        bias: Tensor | None,
        statistics: LayerStatistics,
        rank: int,
        drift: Drift | None = None,
    ) -> Factors:
        """Cut ``weight`` (out, in) to ``rank``.

        >>> down, up, bias = get_method("svd").factor(torch.eye(3), None, LayerStatistics("dense"), rank=2)
        >>> down.shape, up.shape, bias
        (torch.Size([2, 3]), torch.Size([3, 2]), None)

        Args:
            bias: (out,), if the layer has one.
            drift: if ``statistics`` are of inputs x' in a compressed network, how these differ from the dense model's
                x; the factors then answer x' as the dense layer answers x.

        Returns:
            ``down`` (rank, in), ``up`` (out, rank) and the bias (out,), made if the method moves a mean into it;
            float64.
        """
        weight, metric = weight.double(), self.metric(statistics)
        target = weight if drift is None else weight + self._correction(weight, metric, drift)
        _, up, down = solve(target, metric, rank)
        if metric.mean is not None:
            dense_mean = metric.mean if drift is None else drift.mean
            dropped = weight @ dense_mean - up @ (down @ metric.mean)
            bias = dropped if bias is None else bias.double() + dropped
        return *balanced(down, up), bias

    def _correction(self, weight: Tensor, metric: Metric, drift: Drift) -> Tensor:
        """What is added to ``weight`` to make it the best dense answer to x'.

        With the covariance shrunk to S' + l I, E|W x - A x'|^2 + l |W - A|^2 is least at A = W (Cov(x, x') + l I)
        (S' + l I)^-1, which is W + W (Cov(x, x') - S') (S' + l I)^-1: nothing is added where nothing drifted.
        """
        factor = cholesky(collected(metric.inputs))
        return (1 - self.shrink) * torch.cholesky_solve(drift.difference.T @ weight.T, factor).T

    def spectrum(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """Singular values (min(out, in),), falling, float64: the loss at rank r is the sum of their squares from the
        r-th on."""
        return solve(weight.double(), self.metric(statistics), 0)[0]


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> Method:
    """Make ``method`` selectable as ``DecompositionConfig(method=name)``."""
    METHODS[name] = method
    return method


def get_method(name: str) -> Method:
    """The method called ``name``.

    >>> get_method("coupled").needs
    ('gradients',)

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def check_width(linear: nn.Linear, statistics: LayerStatistics) -> None:
    """Raise UserError if ``statistics`` are of inputs of another width than ``linear`` reads."""
    if statistics.width not in (None, linear.in_features):
        raise UserError(
            f"the statistics of {statistics.name} are {statistics.width} wide but the layer reads "
            f"{linear.in_features}; collect them again for this model"
        )


@torch.no_grad()
def factored_linear(
    linear: nn.Linear,
    method: Method,
    statistics: LayerStatistics,
    rank: int,
    drift: Drift | None = None,
) -> LowRankLinear:
    """The low-rank layer of ``rank`` that ``method`` puts in the place of ``linear``, on its device and in its dtype.

    >>> layer = factored_linear(nn.Linear(16, 24), get_method("svd"), LayerStatistics("dense"), rank=3)
    >>> layer.down.shape, layer.up.shape
    (torch.Size([3, 16]), torch.Size([24, 3]))

    Raises:
        UserError: the statistics are of another width.
    """
    check_width(linear, statistics)
    device, dtype = linear.weight.device, linear.weight.dtype
    if drift is not None:
        drift = Drift(drift.difference.to(device), drift.mean.to(device))
    down, up, bias = method.factor(linear.weight, linear.bias, statistics.to(device), rank, drift)
    layer = LowRankLinear.from_factors(down, up, bias, device, dtype)
    return layer.train(linear.training)
