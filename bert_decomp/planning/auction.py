"""One budget spent over blocks of a network, each of which offers options with a cost and an expected loss."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

import numpy as np

from ..errors import UserError

Key = TypeVar("Key", bound=Hashable)


def auction(
    losses: dict[Key, np.ndarray],
    costs: dict[Key, np.ndarray],
    budget: float,
    extra: dict[Key, np.ndarray] | None = None,
) -> dict[Key, int]:
    """Which option each block takes, so that the sum of losses is small and the sum of costs at most ``budget``.

    A Lagrangian: every block takes the option with the least  loss + tau (cost + extra),  and tau is bisected to the
    budget (Everett, 1963). What is left over is spent by exchange: again and again the one block changes its option
    whose loss falls most for what the change costs.

    Args:
        losses: of each block's options (options,).
        costs: of the same, in the budget's unit.
        extra: what an option costs beyond the budget's unit, such as the time of a head where weights are counted.

    Raises:
        UserError: the cheapest options cost more than the budget.

    >>> auction({"a": np.array([9.0, 1, 0]), "b": np.array([4.0, 3, 0])},
    ...         {"a": np.array([0.0, 1, 2]), "b": np.array([0.0, 1, 2])}, 3)
    {'a': 1, 'b': 2}
    """
    smallest = sum(float(cost.min()) for cost in costs.values())
    if smallest > budget:
        raise UserError(f"the budget of {budget:.6g} is too small; the smallest is {smallest:.6g}")
    weighed = costs if extra is None else {key: costs[key] + extra[key] for key in costs}

    def choose(tau: float) -> dict[Key, int]:
        return {key: int(np.argmin(losses[key] + tau * weighed[key])) for key in losses}

    def total(choice: dict[Key, int]) -> float:
        return sum(float(costs[key][index]) for key, index in choice.items())

    choice = {key: int(np.lexsort((losses[key], costs[key]))[0]) for key in losses}
    # tau is in loss per cost, whose scale is unknown: bisected in its logarithm.
    low, high = -120.0, 120.0
    for _ in range(100):
        middle = (low + high) / 2
        trial = choose(np.exp(middle))
        if total(trial) > budget:
            low = middle
        else:
            high, choice = middle, trial
    return _exchange(losses, costs, budget, extra, choice, total(choice))


def _exchange(
    losses: dict[Key, np.ndarray],
    costs: dict[Key, np.ndarray],
    budget: float,
    extra: dict[Key, np.ndarray] | None,
    choice: dict[Key, int],
    spent: float,
) -> dict[Key, int]:
    while True:
        best = None
        for key, now in choice.items():
            change = costs[key] - costs[key][now]
            gain = losses[key][now] - losses[key]
            allowed = (change <= budget - spent) & (gain > 0)
            if extra is not None:
                allowed &= extra[key] <= extra[key][now]
            if not allowed.any():
                continue
            # A change that costs nothing is taken first.
            rate = np.where(allowed, gain / np.maximum(change, 1e-9 * budget), -1.0)
            index = int(rate.argmax())
            if best is None or rate[index] > best[0]:
                best = (rate[index], key, index)
        if best is None:
            return choice
        _, key, index = best
        spent += float(costs[key][index] - costs[key][choice[key]])
        choice = {**choice, key: index}
