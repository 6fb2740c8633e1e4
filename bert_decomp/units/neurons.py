"""``neurons``: the feed-forward keeps those of its neurons from which its output is answered best.

Forward selection with refit: with L L^T = G and S~ the running Schur complement of the neurons' covariance, neuron j
gains |L^T W2 S~_j|^2 / S~_jj. The kept set K leaves W1 its rows and gives

    W2' = W2 S[:, K] S[K, K]^-1,    b2' = b2 + W2 mu - W2' mu_K

A gated feed-forward loses row j of both of its first matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.blocks import LayerPlan
from ..planning.option import Grid, Option
from .factors import with_factors
from .layer import Layer
from .matrix import Matrix

# Neurons taken between two updates of all gains, and how many candidates they are taken from, one by one.
CHUNK, CANDIDATES = 16, 64


def select_columns(weight: Tensor, covariance: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Order the inputs of ``y = weight x`` so that every prefix answers y well.

    Args:
        weight: (m, n).
        covariance: of x (n, n), positive definite.
        root: (m, m), L with L L^T = G.

    Returns:
        The order (n,) and the losses tr(G E[e e^T]) (n + 1,) of answering from the first 0 to n inputs.
    """
    count = len(covariance)
    # Columns of L^T W S~, and of the Cholesky factor of the chosen inputs' covariance.
    cross = root.T @ weight @ covariance
    factor = covariance.new_zeros(count, count)
    rest = covariance.diagonal().clone()
    free = torch.ones(count, dtype=torch.bool, device=covariance.device)
    total = float((cross * (root.T @ weight)).sum())
    order: list[int] = []
    gains: list[Tensor] = []
    while len(order) < count:
        step, start = min(CHUNK, count - len(order)), len(order)
        scores = (cross.square().sum(0) / rest.clamp_min(1e-30)).where(free, -torch.ones_like(rest))
        near = scores.topk(min(CANDIDATES, int(free.sum()))).indices
        # Among the most promising, exactly: their own cross terms, factor rows and variances.
        own_cross, own_rest = cross[:, near].clone(), rest[near].clone()
        own_schur = covariance[near][:, near] - factor[near, :start] @ factor[near, :start].T
        own_free = torch.ones(len(near), dtype=torch.bool, device=near.device)
        picked = []
        for _ in range(step):
            own = (own_cross.square().sum(0) / own_rest.clamp_min(1e-30)).where(
                own_free, -torch.ones_like(own_rest)
            )
            best = int(own.argmax())
            picked.append(best)
            gains.append(own[best])
            own_free[best] = False
            pivot = own_rest[best].clamp_min(1e-30).sqrt()
            column, explained = own_schur[:, best] / pivot, own_cross[:, best] / pivot
            own_cross = own_cross - torch.outer(explained, column)
            own_schur = own_schur - torch.outer(column, column)
            own_rest = own_schur.diagonal().clamp_min(0)
        chosen = near[picked]
        # All others at once: the columns of the Cholesky factor that belong to ``chosen``, and what these explain.
        schur = covariance[:, chosen] - factor[:, :start] @ factor[chosen, :start].T
        lower, failed = torch.linalg.cholesky_ex(schur[chosen])
        if int(failed):
            mean = covariance.diagonal().mean()
            lower = torch.linalg.cholesky(
                schur[chosen]
                + 1e-9 * mean * torch.eye(step, dtype=lower.dtype, device=lower.device)
            )
        columns = torch.linalg.solve_triangular(lower, schur.T, upper=False).T
        explained = torch.linalg.solve_triangular(lower, cross[:, chosen].T, upper=False)
        factor[:, start : start + step] = columns
        cross = cross - explained.T @ columns.T
        rest = (rest - columns.square().sum(1)).clamp_min(0)
        free[chosen] = False
        order += chosen.tolist()
    losses = total - torch.stack([covariance.new_zeros(()), *gains]).cumsum(0)
    losses[-1] = 0
    return torch.tensor(order, device=covariance.device), losses.clamp_min(0)


class Neurons:
    """Prepared for one layer: ``order`` of the neurons and the ``losses`` (n + 1,) of keeping the first of them."""

    def __init__(self, layer: Layer):
        self._layer, second = layer, layer.matrices["ffn_output"]
        self.order, losses = select_columns(second.weight, second.inputs, second.outputs_root)
        self.losses = (second.price * losses).tolist()

    def options(self, grid: Grid, factored: bool) -> list[Option]:
        full = self._layer.sizes.neurons
        options = [
            Option(self.losses[count], {"neurons": count})
            for count in (0, *grid.neuron_counts(full))
        ]
        if factored:
            for count in grid.coarse_neuron_counts(full):
                plan = Option(0.0, {"neurons": count}).apply(self._layer.dense())
                options += with_factors(self.reduce(plan), self.losses[count], {"neurons": count})
        return options

    def reduce(self, plan: LayerPlan) -> dict[str, Matrix]:
        first, second = (self._layer.matrices[part] for part in ("ffn_intermediate", "ffn_output"))
        full = self._layer.sizes.neurons
        if plan.neurons == full:
            return {"ffn_intermediate": first, "ffn_output": second}
        kept = self.order[: plan.neurons].sort().values
        rows = torch.cat([kept, kept + full]) if self._layer.sizes.gated else kept
        covariance = second.inputs[kept][:, kept]
        weight = second.weight[:, kept]
        if plan.neurons:
            weight = torch.linalg.solve(covariance, second.inputs[kept] @ second.weight.T).T
        smaller = Matrix(
            weight,
            second.bias_or_zero + second.weight @ second.mean - weight @ second.mean[kept],
            covariance,
            second.outputs,
            second.mean[kept],
            second.price,
        )
        if not plan.neurons:
            return {"ffn_output": smaller}
        return {
            "ffn_intermediate": Matrix(
                first.weight[rows],
                None if first.bias is None else first.bias[rows],
                first.inputs,
                first.outputs[rows][:, rows],
                first.mean,
                first.price,
            ),
            "ffn_output": smaller,
        }
