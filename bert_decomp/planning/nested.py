"""From plans of several sizes to one whose smaller sizes keep a prefix of the ranks of the larger ones."""

from __future__ import annotations

import math
from dataclasses import replace

from .plan import MatrixPlan, RankPlan


def nested_plan(plans: dict[float, RankPlan], multiple: int = 1) -> RankPlan:
    """The plan of the largest of ``plans`` (by encoder fraction, falling) with the ranks of the others in it.

    Plans of one allocation are nested nearly always; where a rank would grow, the larger size's is taken. A matrix that
    is dense in the larger sizes and factored in a smaller one has no prefix; there it gets the largest rank that saves
    something, a multiple of ``multiple``.

    >>> large = RankPlan({"query": MatrixPlan(12, 12, None), "key": MatrixPlan(12, 12, 4)})
    >>> small = RankPlan({"query": MatrixPlan(12, 12, 2), "key": MatrixPlan(12, 12, 1)})
    >>> plan = nested_plan({0.6: large, 0.2: small})
    >>> [(entry.rank, entry.smaller_ranks) for entry in plan.matrices.values()], plan.fractions
    ([(5, (2,)), (4, (1,))], (0.6, 0.2))
    """
    largest = next(iter(plans.values()))
    matrices = {
        name: _nested([plan.matrices[name] for plan in plans.values()], multiple)
        for name in largest.matrices
    }
    return replace(largest, matrices=matrices, fractions=tuple(plans))


def _nested(entries: list[MatrixPlan], multiple: int) -> MatrixPlan:
    """One matrix, from its entries in plans of falling size."""
    if all(entry.rank is None for entry in entries):
        return entries[0]
    below_dense = (math.ceil(entries[0].break_even_rank) - 1) // multiple * multiple
    ranks: list[int] = []
    for entry in entries:
        rank = below_dense if entry.rank is None else entry.rank
        ranks.append(min([rank, *ranks[-1:]]))
    loss = entries[0].expected_loss if entries[0].rank is not None else None
    return replace(entries[0], rank=ranks[0], expected_loss=loss, smaller_ranks=tuple(ranks[1:]))
