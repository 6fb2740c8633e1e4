"""Spreading a budget over the matrices: the same rank everywhere, or where a rank buys most.

``waterfill`` keeps singular value i of matrix l when  w_l s_li^2 / (m_l + n_l) >= tau  and bisects tau to the budget:
a rank of matrix l costs m_l + n_l numbers and saves w_l s_li^2 of loss, so what is kept is what saves most for its
price. w_l turns the method's loss at the layer's output into the model's loss; with w_l = 1 the result is worse than
uniform, because outputs of different layers are not on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError
from .plan import MatrixPlan, RankPlan

# (out, in) of each weight, by qualified name.
Shapes = dict[str, tuple[int, int]]
# The plan for a share of the matrices' weights.
Allocate = Callable[[float], RankPlan]


def shapes_of(modules: dict[str, nn.Linear]) -> Shapes:
    """(out, in) of each layer's weight.

    >>> shapes_of({"ffn": nn.Linear(12, 48)})
    {'ffn': (48, 12)}
    """
    return {
        name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in modules.items()
    }


def weights_of(shapes: Shapes) -> int:
    """Numbers in the dense matrices."""
    return sum(rows * columns for rows, columns in shapes.values())


def dense_plan(shapes: Shapes) -> RankPlan:
    """The plan that leaves every matrix as it is."""
    return RankPlan(
        {name: MatrixPlan(columns, rows, None, 0.0) for name, (rows, columns) in shapes.items()}
    )


def uniform(shapes: Shapes, rank: int) -> RankPlan:
    """The same rank everywhere; a matrix whose rank would reach break-even stays dense.

    >>> uniform({"query": (12, 12), "ffn": (48, 12)}, 6).matrices["query"].rank is None
    True

    Args:
        shapes: (out, in) of each weight.

    Raises:
        UserError: the rank is below 1, or reaches break-even of every matrix.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is too small; the smallest is 1")
    plan = RankPlan({name: MatrixPlan.of(shape, rank) for name, shape in shapes.items()})
    if all(entry.rank is None for entry in plan.matrices.values()):
        largest = max(entry.break_even_rank for entry in plan.matrices.values())
        raise UserError(
            f"rank {rank} reaches break-even of every matrix; the largest that compresses one is "
            f"{math.ceil(largest) - 1}"
        )
    return plan


def fraction_of(shapes: Shapes, rank: int) -> float:
    """The share of the matrices' weights that ``rank`` everywhere keeps.

    >>> fraction_of({"query": (12, 12)}, 3)
    0.5
    """
    return RankPlan(
        {name: MatrixPlan.of(shape, rank) for name, shape in shapes.items()}
    ).encoder_fraction


def rounded_up(share: float) -> float:
    """To four digits, so that what a message names as the smallest can be had."""
    return math.ceil(share * 1e4) / 1e4


def check_fraction(shapes: Shapes, fraction: float, rank: int) -> None:
    """Raise UserError unless ``fraction`` lies between what ``rank`` everywhere weighs and 1."""
    if not 0 < fraction < 1:
        raise UserError(f"encoder_fraction is {fraction}; give a share between 0 and 1")
    smallest = fraction_of(shapes, rank)
    if fraction < smallest:
        raise UserError(
            f"encoder_fraction {fraction:.4g} is below what rank {rank} everywhere weighs; the smallest is "
            f"{rounded_up(smallest)}"
        )


def least_rank(multiple: int, min_rank: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``min_rank``.

    >>> least_rank(multiple=8, min_rank=4)
    8
    """
    return multiple * math.ceil(max(min_rank, 1) / multiple)


def within_fraction(
    shapes: Shapes, fraction: float, multiple: int = 1, min_rank: int = 1
) -> RankPlan:
    """The largest uniform rank (a multiple of ``multiple``, not below ``min_rank``) that keeps at most ``fraction`` of
    the matrices' weights.

    >>> plan = within_fraction({"query": (12, 12), "ffn": (48, 12)}, 0.5)
    >>> {name: entry.rank for name, entry in plan.matrices.items()}, plan.encoder_fraction
    ({'query': 4, 'ffn': 4}, 0.4666666666666667)

    Raises:
        UserError: the fraction is not between 0 and 1, or below what the smallest rank weighs.
    """
    check_fraction(shapes, fraction, least_rank(multiple, min_rank))
    low, high = 1, max(min(shape) for shape in shapes.values()) // multiple
    while low < high:
        middle = (low + high + 1) // 2
        if fraction_of(shapes, middle * multiple) <= fraction:
            low = middle
        else:
            high = middle - 1
    return uniform(shapes, low * multiple)


def waterfill(
    shapes: Shapes,
    spectra: dict[str, Tensor],
    weights: dict[str, float],
    fraction: float,
    *,
    multiple: int = 1,
    min_rank: int = 1,
    groups: list[list[str]] | None = None,
) -> RankPlan:
    """Ranks that minimise the expected loss within ``fraction`` of the matrices' weights.

    >>> spectra = {"a": torch.tensor([9.0, 8.0] + 6 * [1.0]), "b": torch.tensor([3.0] + 7 * [0.1])}
    >>> plan = waterfill({"a": (8, 8), "b": (8, 8)}, spectra, {"a": 1.0, "b": 1.0}, fraction=0.4)
    >>> {name: entry.rank for name, entry in plan.matrices.items()}
    {'a': 2, 'b': 1}

    Args:
        shapes: (out, in) of each weight.
        spectra: singular values of each matrix as the method weighs it, falling, not normalised.
        weights: w_l of each matrix.
        multiple: every rank is a multiple of it.
        min_rank: no rank is below it (rounded up to a multiple).
        groups: matrices of one shape that must get one rank, such as a fused query, key and value.

    Raises:
        UserError: the fraction is not between 0 and 1, or below what the smallest rank weighs.
    """
    least = least_rank(multiple, min_rank)
    check_fraction(shapes, fraction, least)
    energies = {name: weights[name] * spectra[name].double().square() for name in shapes}
    grouped = [name for group in groups or [] for name in group]
    groups = [*(groups or []), *([name] for name in shapes if name not in grouped)]
    gains = []
    for group in groups:
        cost = sum(sum(shapes[name]) for name in group)
        energy = energies[group[0]]
        for name in group[1:]:
            energy = energy + energies[name]
        gains.append(energy / cost)
    # One unit of choice is ``multiple`` ranks; a block's gain is its mean, and stays falling.
    blocks = [
        gain[: len(gain) // multiple * multiple].reshape(-1, multiple).mean(1) for gain in gains
    ]

    def plan(tau: float) -> RankPlan:
        matrices = {}
        for group, block in zip(groups, blocks, strict=True):
            rank = max(least, multiple * int((block >= tau).sum()))
            for name in group:
                matrices[name] = MatrixPlan.of(
                    shapes[name], rank, float(energies[name][rank:].sum())
                )
        return RankPlan({name: matrices[name] for name in shapes})

    # The distinct thresholds, rising: the plan shrinks along them, and the last one keeps nothing but ``least``.
    taus = torch.cat([*blocks, torch.tensor([math.inf], dtype=torch.float64)]).unique()
    low, high = 0, len(taus) - 1
    while low < high:
        middle = (low + high) // 2
        if plan(float(taus[middle])).encoder_fraction <= fraction:
            high = middle
        else:
            low = middle + 1
    return plan(float(taus[low]))
