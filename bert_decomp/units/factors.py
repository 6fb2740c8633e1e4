"""Two factors on top of a pair of matrices: both, spent where a rank buys most, or one of them beside a dense one."""

from __future__ import annotations

from typing import Any

import torch

from ..planning.option import Option
from .matrix import Matrix

# Ranks between two offers that leave one of the pair dense.
STEP = 8


def break_even(matrix: Matrix) -> int:
    """The first rank at which two factors are no smaller than the matrix."""
    rows, columns = matrix.weight.shape
    return -(-rows * columns // (rows + columns))


def with_factors(pair: dict[str, Matrix], loss: float, sizes: dict[str, Any]) -> list[Option]:
    """Offers that factor one or both of ``pair`` (two matrices by part), on top of ``loss`` and ``sizes``.

    A singular value of the first costs rows + columns weights and saves its square, as in ``waterfill``: both ranks
    grow along one path, in the order of what a weight buys.
    """
    first, second = pair
    losses = {part: matrix.losses() for part, matrix in pair.items()}
    limits = {part: break_even(matrix) for part, matrix in pair.items()}
    prices = {part: sum(matrix.weight.shape) for part, matrix in pair.items()}
    gains = {part: (-losses[part].diff() / prices[part])[: limits[part] - 1] for part in pair}
    merged = torch.cat([gains[first], gains[second]]).argsort(descending=True, stable=True)
    of_first = merged < len(gains[first])
    ranks = torch.stack([of_first.cumsum(0), (~of_first).cumsum(0)], 1).clamp_min(1).tolist()
    options = [
        Option(
            loss + float(losses[first][r]) + float(losses[second][s]),
            sizes,
            {first: r, second: s},
        )
        for r, s in dict.fromkeys(map(tuple, ranks))
    ]
    for part in pair:
        options += [
            Option(loss + float(losses[part][rank]), sizes, {part: rank})
            for rank in range(STEP, limits[part], STEP)
        ]
    return options
