"""Ranks as data: a ``RankPlan`` says what becomes of every matrix; applying it is ``decompose_``'s dull job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .errors import UserError


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix: its shape and the rank it is cut to; None leaves it dense."""

    in_features: int
    out_features: int
    rank: int | None

    @property
    def break_even_rank(self) -> float:
        """in * out / (in + out): from this rank on the factors are no smaller than the matrix."""
        return self.in_features * self.out_features / (self.in_features + self.out_features)

    @property
    def weights(self) -> int:
        """Numbers held after applying the plan, bias apart."""
        if self.rank is None:
            return self.in_features * self.out_features
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class RankPlan:
    """``matrices`` by qualified name. ``to_dict`` and ``from_dict`` go through JSON, which a user may edit."""

    matrices: dict[str, MatrixPlan]

    @property
    def encoder_fraction(self) -> float:
        """Weights kept, as a share of the dense matrices' weights."""
        dense = sum(entry.in_features * entry.out_features for entry in self.matrices.values())
        return sum(entry.weights for entry in self.matrices.values()) / dense

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "encoder_fraction": self.encoder_fraction,
                "matrices": {name: asdict(entry) for name, entry in self.matrices.items()}}

    @classmethod
    def from_dict(cls, value: Any) -> RankPlan:
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: it is of another version or malformed.
        """
        if not isinstance(value, dict) or value.get("version") != 1:
            raise UserError("this is not a rank plan of version 1; make it anew")
        try:
            matrices = {name: MatrixPlan(**entry) for name, entry in value["matrices"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the rank plan is malformed ({error}); make it anew") from error
        for name, entry in matrices.items():
            numbers = (entry.in_features, entry.out_features) + (() if entry.rank is None else (entry.rank,))
            if not all(type(number) is int and number >= 1 for number in numbers):
                raise UserError(f"the rank plan's entry for {name} has something else than positive whole numbers")
        return cls(matrices)


def _entry(linear: nn.Linear, rank: int) -> MatrixPlan:
    plan = MatrixPlan(linear.in_features, linear.out_features, rank)
    return plan if rank < plan.break_even_rank else MatrixPlan(linear.in_features, linear.out_features, None)


def uniform(modules: dict[str, nn.Linear], rank: int) -> RankPlan:
    """The same rank everywhere; a matrix whose rank would reach break-even stays dense.

    Raises:
        UserError: the rank is below 1, or reaches break-even of every matrix.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is too small; the smallest is 1")
    plan = RankPlan({name: _entry(linear, rank) for name, linear in modules.items()})
    if all(entry.rank is None for entry in plan.matrices.values()):
        most = max(entry.break_even_rank for entry in plan.matrices.values())
        raise UserError(f"rank {rank} reaches break-even of every matrix; the largest that compresses one is "
                        f"{-int(-most // 1) - 1}")
    return plan


def within_parameters(modules: dict[str, nn.Linear], fraction: float) -> RankPlan:
    """The largest uniform rank whose weights are at most ``fraction`` of the dense matrices' weights.

    Raises:
        UserError: the fraction is not between 0 and 1, or below what rank 1 weighs.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the parameter budget is {fraction}; give a share between 0 and 1")
    largest = max(min(linear.in_features, linear.out_features) for linear in modules.values())
    smallest = RankPlan({name: _entry(linear, 1) for name, linear in modules.items()}).encoder_fraction
    if fraction < smallest:
        raise UserError(f"a budget of {fraction} is below what rank 1 everywhere weighs; the smallest is {smallest:.4f}")
    low, high = 1, largest
    while low < high:
        middle = (low + high + 1) // 2
        plan = RankPlan({name: _entry(linear, middle) for name, linear in modules.items()})
        low, high = (middle, high) if plan.encoder_fraction <= fraction else (low, middle - 1)
    return uniform(modules, low)
