"""``scores``: query and key of a head act only through  q^T k = x^T Wq^T Wk x,  of which fewer dimensions are kept.

Per head of size d, the best r of them come from a two-sided singular value decomposition of the identity (CLOVER, arXiv
2411.17426, takes the weights alone): "inputs" are Sq + Gk, what q is and what the loss makes of k, and "outputs" Gq +
Sk, each divided by its trace. It gives up (d, r) and down (r, d), and

    Wq' = sqrt(r / d) down Wq,    bq' = sqrt(r / d) down bq,    Wk' = up^T Wk

so that scores divided by sqrt(r) are those that were divided by sqrt(d). The key's bias adds the same to all scores of
a query and drops out of the softmax exactly. Biases that are added to scores (MPNet) do not interfere; rotary
positions, which stand between query and key, do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..methods import Metric, balanced, shrunk, solve
from ..methods.kfac import SHRINK_OUTPUTS
from ..planning.blocks import LayerPlan
from ..planning.option import Grid, Option
from .factors import with_factors
from .layer import Layer
from .matrix import Matrix

# Query and key are known exactly from their inputs, so little shrinking will do.
SHRINK = 0.01


class Scores:
    """Prepared for one layer: ``losses`` (heads, d + 1) of keeping 0 to d dimensions of each head, None where rotary
    positions rule that out."""

    def __init__(self, layer: Layer):
        self._layer, self._bases, losses = layer, [], []
        for head in range(0 if layer.sizes.rotary else layer.sizes.heads):
            up, down, lost = self._decompose(head)
            self._bases.append((up, down))
            losses.append(lost)
        self.losses = torch.stack(losses) if losses else None

    def _decompose(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """``up`` (d, d), ``down`` (d, d) with columns and rows falling in importance, and the losses (d + 1,)."""
        query, key = (self._layer.matrices[part] for part in ("query", "key"))
        size = self._layer.sizes.head_size
        rows = slice(head * size, (head + 1) * size)
        mean = query.weight[rows] @ query.mean + query.bias_or_zero[rows]
        query_moment = shrunk(_carried(query, rows) + torch.outer(mean, mean), SHRINK)
        key_moment = shrunk(_carried(key, rows), SHRINK)
        query_outputs = shrunk(query.outputs[rows, rows], SHRINK_OUTPUTS)
        key_outputs = shrunk(key.outputs[rows, rows], SHRINK_OUTPUTS)
        metric = Metric(
            query_moment / query_moment.trace() + key_outputs / key_outputs.trace(),
            query_outputs / query_outputs.trace() + key_moment / key_moment.trace(),
        )
        identity = torch.eye(size, dtype=query.weight.dtype, device=query.weight.device)
        _, up, down = solve(identity, metric, size)
        lost = []
        for kept in range(size + 1):
            rest = identity - up[:, :kept] @ down[:kept]
            of_query = ((query_outputs @ rest @ query_moment) * rest).sum()
            of_key = ((key_outputs @ rest.T @ key_moment) * rest.T).sum()
            lost.append((query.price * of_query + key.price * of_key) / 2)
        lost[-1] = torch.zeros_like(lost[-1])
        return up, down, torch.stack(lost)

    def basis(self, head: int) -> tuple[Tensor, Tensor]:
        """``up`` (d, d) and ``down`` (d, d) of one head, columns and rows falling in importance."""
        return self._bases[head]

    def options(self, grid: Grid, factored: bool) -> list[Option]:
        if self.losses is None:
            raise UserError(
                "rotary positions stand between query and key, so their dimensions cannot be made fewer; "
                "use the unit heads"
            )
        size, totals = self._layer.sizes.head_size, self.losses.sum(0).tolist()
        options = [Option(totals[r], {"score_size": r}) for r in grid.head_sizes(size)]
        if factored:
            for r in grid.coarse_head_sizes(size):
                pair = self.reduce(_resized(self._layer, r))
                options += with_factors(pair, totals[r], {"score_size": r})
        return options

    def reduce(self, plan: LayerPlan) -> dict[str, Matrix]:
        query, key = (self._layer.matrices[part] for part in ("query", "key"))
        size, kept = self._layer.sizes.head_size, plan.score_size
        if not plan.heads:
            return {}
        if kept == size:
            if len(plan.heads) == self._layer.sizes.heads:
                return {"query": query, "key": key}
            rows = head_rows(plan.heads, size, query.weight.device)
            return {
                part: Matrix(
                    matrix.weight[rows],
                    None if matrix.bias is None else matrix.bias[rows],
                    matrix.inputs,
                    matrix.outputs[rows][:, rows],
                    matrix.mean,
                    matrix.price,
                )
                for part, matrix in (("query", query), ("key", key))
            }
        scale = (kept / size) ** 0.5
        # Block-diagonal over the kept heads: q' = to_query q, k' = to_key^T k, and q ~ to_key q' / scale.
        to_query = query.weight.new_zeros(len(plan.heads) * kept, len(query.weight))
        to_key = query.weight.new_zeros(len(query.weight), len(plan.heads) * kept)
        for place, head in enumerate(plan.heads):
            up, down = self._bases[head]
            down, up = balanced(down[:kept], up[:, :kept])
            small, large = (
                slice(place * kept, (place + 1) * kept),
                slice(head * size, (head + 1) * size),
            )
            to_query[small, large], to_key[large, small] = down, up
        return {
            "query": Matrix(
                scale * to_query @ query.weight,
                scale * to_query @ query.bias_or_zero,
                query.inputs,
                to_key.T @ query.outputs @ to_key / scale**2,
                query.mean,
                query.price,
            ),
            "key": Matrix(
                to_key.T @ key.weight,
                None,
                key.inputs,
                to_query @ key.outputs @ to_query.T,
                key.mean,
                key.price,
            ),
        }


def _carried(matrix: Matrix, rows: slice) -> Tensor:
    """Covariance of the outputs ``rows`` of a matrix."""
    return matrix.weight[rows] @ matrix.inputs @ matrix.weight[rows].T


def head_rows(heads: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """The rows of whole ``heads``."""
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads]).to(device)


def _resized(layer: Layer, score_size: int) -> LayerPlan:
    return Option(0.0, {"score_size": score_size}).apply(layer.dense())
