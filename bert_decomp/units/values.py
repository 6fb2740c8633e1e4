"""``values``: of the context that a head hands to the attention output, fewer coordinates are kept.

Only the output matrix Wo is approximated. c' = T c with T block-diagonal over the heads, whose rows come from a
two-sided singular value decomposition of Wo's columns of each head; with S the covariance of c and bv the value's bias
(which attention hands on as it is, its probabilities adding up to 1):

    Wv' = T Wv,    Wo' = Wo S T^T (T S T^T)^-1,    bo' = bo + Wo mu - Wo' T (mu - bv)

Wo' is the best answer to the coordinates that are left, so what other heads know of the lost ones is not lost. T is
polished by block coordinate descent: each head's rows again, on what the other heads leave unexplained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import Metric, solve
from ..planning.blocks import LayerPlan
from ..planning.option import Grid, Option
from .factors import with_factors
from .layer import Layer
from .matrix import Matrix

SWEEPS = 2


class Values:
    """Prepared for one layer: the coordinates of each head, falling in importance."""

    def __init__(self, layer: Layer):
        self._layer = layer
        output, size = layer.matrices["attention_output"], layer.sizes.head_size
        self._bases = []
        for head in range(layer.sizes.heads):
            own = slice(head * size, (head + 1) * size)
            metric = Metric(output.inputs[own, own], output.metric().outputs)
            _, _, down = solve(output.weight[:, own], metric, size)
            self._bases.append(down / down.norm(dim=1, keepdim=True))
        basis = torch.block_diag(*self._bases)
        self._covariance = basis @ output.inputs @ basis.T
        self._root = output.outputs_root.T
        # How the output, as the loss sees it, goes with each coordinate.
        self._cross = self._root @ output.weight @ output.inputs @ basis.T
        half = self._root @ output.weight
        self.total = output.price * float(((half @ output.inputs) * half).sum())

    def losses(self, heads: tuple[int, ...]) -> list[float]:
        """The loss of keeping 0 to d leading coordinates of each of ``heads`` and none of the others.

        With coordinates in the order of their rank in their head and a Cholesky factor C of their covariance, the
        columns of cross C^-T are what each explains beyond those before it.
        """
        size = self._layer.sizes.head_size
        order = torch.tensor([head * size + rank for rank in range(size) for head in heads])
        factor = torch.linalg.cholesky(self._covariance[order][:, order])
        explained = torch.linalg.solve_triangular(factor, self._cross[:, order].T, upper=False)
        gains = explained.square().sum(1).reshape(size, len(heads)).sum(1).cumsum(0)
        price = self._layer.matrices["attention_output"].price
        losses = [self.total, *(self.total - price * gains).clamp_min(0).tolist()]
        if len(heads) == self._layer.sizes.heads:
            losses[-1] = 0.0
        return losses

    def options(self, grid: Grid, factored: bool) -> list[Option]:
        sizes, losses = self._layer.sizes, self.losses(tuple(range(self._layer.sizes.heads)))
        options = [Option(losses[r], {"value_size": r}) for r in grid.head_sizes(sizes.head_size)]
        if factored:
            for r in grid.coarse_head_sizes(sizes.head_size):
                plan = Option(0.0, {"value_size": r}).apply(self._layer.dense())
                # Sweeps change T little, and only the plan that is chosen is worth them.
                options += with_factors(self.reduce(plan, sweeps=0), losses[r], {"value_size": r})
        return options

    def reduce(self, plan: LayerPlan, sweeps: int = SWEEPS) -> dict[str, Matrix]:
        layer, output = self._layer, self._layer.matrices["attention_output"]
        if not plan.heads:
            return {"attention_output": _constant(output)}
        sizes, value = layer.sizes, layer.matrices["value"]
        if plan.value_size == sizes.head_size and len(plan.heads) == sizes.heads:
            return {"value": value, "attention_output": output}
        keep = self._coordinates(plan, sweeps)
        covariance = keep @ output.inputs @ keep.T
        # c ~ back c'.
        back = torch.linalg.solve(covariance, keep @ output.inputs).T
        weight = output.weight @ back
        mean = keep @ (output.mean - value.bias_or_zero)
        return {
            "value": Matrix(
                keep @ value.weight,
                None,
                value.inputs,
                back.T @ value.outputs @ back,
                value.mean,
                value.price,
            ),
            "attention_output": Matrix(
                weight,
                output.bias_or_zero + output.weight @ output.mean - weight @ mean,
                covariance,
                output.outputs,
                mean,
                output.price,
            ),
        }

    def _coordinates(self, plan: LayerPlan, sweeps: int) -> Tensor:
        """T (kept coordinates, dense width)."""
        sizes = self._layer.sizes
        identity = torch.eye(sizes.head_size, dtype=self._cross.dtype, device=self._cross.device)
        if plan.value_size == sizes.head_size:
            bases = {head: identity for head in plan.heads}
            sweeps = 0
        else:
            bases = {head: self._bases[head][: plan.value_size] for head in plan.heads}
        for _ in range(sweeps):
            for head in plan.heads:
                bases[head] = self._polished(head, bases, plan.value_size)
        return self._stack(bases)

    def _stack(self, bases: dict[int, Tensor]) -> Tensor:
        size, rows = self._layer.sizes.head_size, []
        for head, basis in bases.items():
            row = basis.new_zeros(len(basis), len(self._covariance))
            row[:, head * size : (head + 1) * size] = basis
            rows.append(row)
        return torch.cat(rows)

    def _polished(self, head: int, bases: dict[int, Tensor], kept: int) -> Tensor:
        """The best ``kept`` rows of one head for what the others leave of the context."""
        output, size = self._layer.matrices["attention_output"], self._layer.sizes.head_size
        own = slice(head * size, (head + 1) * size)
        columns = output.inputs[:, own]
        if len(bases) > 1:
            others = self._stack({other: basis for other, basis in bases.items() if other != head})
            crossed = others @ output.inputs
            columns = columns - crossed.T @ torch.linalg.solve(crossed @ others.T, crossed[:, own])
        covariance = (columns[own] + columns[own].T) / 2
        covariance = covariance + 1e-9 * covariance.diagonal().mean() * torch.eye(
            size, dtype=covariance.dtype, device=covariance.device
        )
        weight = torch.linalg.solve(covariance, (output.weight @ columns).T).T
        _, _, down = solve(weight, Metric(covariance, output.metric().outputs), kept)
        return down / down.norm(dim=1, keepdim=True)


def _constant(output: Matrix) -> Matrix:
    """What is left of the attention output when attention goes: the mean of what it gave, as a bias."""
    empty = output.weight[:, :0]
    return Matrix(
        empty,
        output.bias_or_zero + output.weight @ output.mean,
        output.inputs[:0, :0],
        output.outputs,
        output.mean[:0],
        output.price,
    )
