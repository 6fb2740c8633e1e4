"""One weight matrix with what the loss makes of an error in it, before and after its neighbours were made smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods import Metric, balanced, shrunk, solve
from ..methods.kfac import SHRINK_INPUTS, SHRINK_OUTPUTS
from ..statistics import LayerStatistics, collected


@dataclass(frozen=True)
class Matrix:
    """y = weight x + bias, float64; an error D of the weight costs price tr(G D S D^T) once the bias follows the mean.

    ``inputs`` S (n, n) is the covariance of x over tokens weighted by |dLoss/dy|^2, shrunk; ``outputs`` (m, m) is
    E[g g^T] with mean diagonal 1, not yet shrunk; ``mean`` (n,); ``price`` E|g|^2 per output (see ``coupled``).
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    outputs: Tensor
    mean: Tensor
    price: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, statistics: LayerStatistics) -> Matrix:
        """A dense layer's matrix; ``statistics`` must have gradients."""
        gradients = collected(statistics.gradients)
        return cls(
            weight.double(),
            None if bias is None else bias.double(),
            shrunk(gradients.input_covariance, SHRINK_INPUTS),
            gradients.relative_second_moment,
            gradients.input_mean,
            gradients.energy / len(gradients.second_moment),
        )

    def third(self, index: int) -> Matrix:
        """Of a joint query, key and value matrix, the part with that ``index``."""
        size = len(self.weight) // 3
        rows = slice(index * size, (index + 1) * size)
        return replace(
            self,
            weight=self.weight[rows],
            bias=None if self.bias is None else self.bias[rows],
            outputs=self.outputs[rows, rows],
        )

    @property
    def bias_or_zero(self) -> Tensor:
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias

    @property
    def outputs_root(self) -> Tensor:
        """L with L L^T = G."""
        return torch.linalg.cholesky(shrunk(self.outputs, SHRINK_OUTPUTS))

    def metric(self) -> Metric:
        """The loss of an approximation, price apart."""
        return Metric(self.inputs, shrunk(self.outputs, SHRINK_OUTPUTS), self.mean)

    def losses(self) -> Tensor:
        """(min(m, n) + 1,): the loss of the best two factors of every rank from 0 to full."""
        gains = self.price * solve(self.weight, self.metric(), 0)[0].square()
        return torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``down`` (rank, n), ``up`` (m, rank) and the bias (m,) of the best two factors."""
        _, up, down = solve(self.weight, self.metric(), rank)
        bias = self.bias_or_zero + self.weight @ self.mean - up @ (down @ self.mean)
        return *balanced(down, up), bias
