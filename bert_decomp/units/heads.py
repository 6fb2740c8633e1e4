"""``heads``: whole heads go, and those that stay get one size of scores and one of values.

Heads are eliminated one after another, always the one without which the attention output can be answered best from the
rest (its loss after the refit of Wo). Every number of heads then offers every pair of sizes. What comes out are dense
matrices of smaller sizes: plain attention.
"""

from __future__ import annotations

import torch

from ..planning.blocks import LayerPlan
from ..planning.option import Grid, Option
from .layer import Layer
from .matrix import Matrix
from .scores import Scores, head_rows
from .values import Values


class Heads:
    """Prepared for one layer: ``kept`` maps a number of heads to those that stay."""

    def __init__(self, layer: Layer):
        self._layer = layer
        self.kept = self._eliminate()

    def _eliminate(self) -> dict[int, tuple[int, ...]]:
        """Heads that stay, by their number.

        With P the inverse covariance of the context that is left and B the output's refit to it, losing the columns a
        of one head costs tr(G B_a P_aa^-1 B_a^T).
        """
        output, size = self._layer.matrices["attention_output"], self._layer.sizes.head_size
        root, heads = output.outputs_root.T @ output.weight, list(range(self._layer.sizes.heads))
        kept = {len(heads): tuple(heads)}
        while len(heads) > 1:
            rows = head_rows(tuple(heads), size, root.device)
            inverse = torch.linalg.inv(output.inputs[rows][:, rows])
            refit = root @ output.inputs[:, rows] @ inverse
            costs = []
            for place in range(len(heads)):
                own = slice(place * size, (place + 1) * size)
                block = refit[:, own]
                costs.append(
                    float((torch.linalg.solve(inverse[own, own], block.T).T * block).sum())
                )
            heads.pop(min(range(len(heads)), key=costs.__getitem__))
            kept[len(heads)] = tuple(heads)
        return kept

    def options(self, grid: Grid, factored: bool) -> list[Option]:
        layer, sizes = self._layer, self._layer.sizes
        values, scores = layer.unit("values"), layer.unit("scores")
        assert isinstance(values, Values)
        assert isinstance(scores, Scores)
        offered = [sizes.head_size] if sizes.rotary else grid.head_sizes(sizes.head_size)
        options = [] if sizes.rotary else [Option(values.total, {"heads": ()})]
        for heads in self.kept.values():
            of_values = values.losses(heads)
            of_scores = [0.0] * (sizes.head_size + 1)
            if scores.losses is not None:
                of_scores = scores.losses[list(heads)].sum(0).tolist()
            options += [
                Option(
                    of_values[value_size] + of_scores[score_size],
                    {"heads": heads, "score_size": score_size, "value_size": value_size},
                )
                for score_size in offered
                for value_size in offered
            ]
        return options

    def reduce(self, plan: LayerPlan) -> dict[str, Matrix]:
        return {
            **self._layer.unit("scores").reduce(plan),
            **self._layer.unit("values").reduce(plan),
        }
