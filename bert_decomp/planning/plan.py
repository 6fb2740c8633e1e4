"""Ranks as data: a ``RankPlan`` says what becomes of every matrix; applying it is ``decompose_``'s dull job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from ..errors import UserError

LARGEST_SIZE = 2**31 - 1
LARGEST_LOSS = 1e300


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix: its shape and the rank it is cut to (None leaves it dense); ``expected_loss`` is the method's own
    loss at that rank, weighted by what the model's loss makes of it where the allocation knows; None if unknown.

    ``smaller_ranks`` are those of the smaller sizes of a nested model, falling.

    >>> entry = MatrixPlan(in_features=768, out_features=768, rank=245)
    >>> entry.break_even_rank, entry.weights, entry.flops
    (384.0, 376320, 752640)
    """

    in_features: int
    out_features: int
    rank: int | None
    expected_loss: float | None = None
    smaller_ranks: tuple[int, ...] = ()

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

    @property
    def flops(self) -> int:
        """Multiplications and additions a token."""
        return 2 * self.weights

    @classmethod
    def of(
        cls, shape: tuple[int, int], rank: int, expected_loss: float | None = None
    ) -> MatrixPlan:
        """Cut a weight of ``shape`` (out, in) to ``rank``, or leave it dense from break-even on."""
        out_features, in_features = shape
        plan = cls(in_features, out_features, rank, expected_loss)
        return plan if rank < plan.break_even_rank else cls(in_features, out_features, None, 0.0)


@dataclass(frozen=True)
class RankPlan:
    """``matrices`` of the encoder by qualified name, and ``embeddings``: the word embedding's table, if it is cut or a
    budget left it dense, with the tokens as input features. ``fractions`` of the encoder are what the sizes of a nested
    model are called, falling, the largest first; none, if there is one size. ``to_dict`` and ``from_dict`` go through
    JSON, which a user may edit.

    >>> plan = RankPlan({"query": MatrixPlan(768, 768, rank=192), "key": MatrixPlan(768, 768, rank=None)})
    >>> plan.encoder_fraction
    0.75
    >>> RankPlan.from_dict(plan.to_dict()) == plan
    True
    """

    matrices: dict[str, MatrixPlan]
    embeddings: dict[str, MatrixPlan] = field(default_factory=dict)
    fractions: tuple[float, ...] = ()

    @property
    def encoder_fraction(self) -> float:
        """Weights kept, as a share of the dense matrices' weights."""
        dense = sum(entry.in_features * entry.out_features for entry in self.matrices.values())
        return sum(entry.weights for entry in self.matrices.values()) / dense

    def at(self, fraction: float) -> RankPlan:
        """The plan of one size of a nested model, by what it is called in ``fractions``.

        >>> plan = RankPlan({"query": MatrixPlan(768, 768, 192, smaller_ranks=(96,))}, fractions=(0.5, 0.25))
        >>> plan.at(0.25).matrices["query"].rank
        96
        """
        size = self.fractions.index(fraction)
        matrices = {
            name: replace(
                entry,
                rank=entry.rank
                if not size or entry.rank is None
                else entry.smaller_ranks[size - 1],
                expected_loss=None if size else entry.expected_loss,
                smaller_ranks=(),
            )
            for name, entry in self.matrices.items()
        }
        return RankPlan(matrices, self.embeddings)

    @property
    def flops(self) -> int:
        """Multiplications and additions a token, of these matrices and of the way up from an embedding's codes."""
        return sum(entry.flops for entry in self.matrices.values()) + flops_of(self.embeddings)

    @property
    def expected_loss(self) -> float | None:
        """Sum over the matrices and embeddings, if all are known."""
        entries = (*self.matrices.values(), *self.embeddings.values())
        return total_loss(entry.expected_loss for entry in entries)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "encoder_fraction": self.encoder_fraction,
            "flops_per_token": self.flops,
            "expected_loss": self.expected_loss,
            "matrices": {name: _entry(entry) for name, entry in self.matrices.items()},
            **embeddings_to_dict(self.embeddings),
            **({"fractions": list(self.fractions)} if self.fractions else {}),
        }

    @classmethod
    def from_dict(cls, value: Any) -> RankPlan:
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: it is of another version or malformed.
        """
        if (
            not isinstance(value, dict)
            or type(value.get("version")) is not int
            or value["version"] != 1
        ):
            raise UserError("this is not a rank plan of version 1; make it again")
        entries = value.get("matrices")
        if not isinstance(entries, dict) or not entries:
            raise UserError("the rank plan has no matrices; make it again")
        fractions = read_fractions(value.get("fractions", []))
        plan = cls(_read_entries(entries), read_embeddings(value), fractions)
        return replace(
            plan,
            matrices={
                name: replace(entry, smaller_ranks=_smaller(name, entry, len(fractions)))
                for name, entry in plan.matrices.items()
            },
        )


def total_loss(losses: Iterable[float | None]) -> float | None:
    """Their sum, if all are known.

    >>> total_loss([1.5, 2]), total_loss([1.5, None])
    (3.5, None)
    """
    known = list(losses)
    return None if None in known else float(sum(loss for loss in known if loss is not None))


def flops_of(embeddings: dict[str, MatrixPlan]) -> int:
    """Multiplications and additions a token, of the way up from the codes of factored embeddings."""
    return sum(
        2 * entry.rank * entry.out_features
        for entry in embeddings.values()
        if entry.rank is not None
    )


def embeddings_to_dict(embeddings: dict[str, MatrixPlan]) -> dict[str, Any]:
    """The part of a plan file that is about embeddings; nothing where no budget counted them."""
    entries = {name: _entry(entry) for name, entry in embeddings.items()}
    return {"embeddings": entries} if entries else {}


def read_embeddings(value: dict[str, Any]) -> dict[str, MatrixPlan]:
    """What ``embeddings_to_dict`` wrote into a plan file, or a UserError."""
    entries = value.get("embeddings", {})
    if not isinstance(entries, dict):
        raise UserError("the plan's embeddings are not a table of names; make it again")
    read = _read_entries(entries)
    return {
        name: replace(entry, smaller_ranks=_smaller(name, entry, 0)) for name, entry in read.items()
    }


def _read_entries(value: dict[str, Any]) -> dict[str, MatrixPlan]:
    """Entries by name, or a UserError; their ``smaller_ranks`` are for ``_smaller`` to check."""
    try:
        entries = {name: MatrixPlan(**entry) for name, entry in value.items()}
    except TypeError as error:
        raise UserError(f"the rank plan is malformed ({error}); make it again") from error
    for name, entry in entries.items():
        numbers = [entry.in_features, entry.out_features]
        if entry.rank is not None:
            numbers.append(entry.rank)
        # type(), because True is an int, too.
        if not all(type(number) is int and 1 <= number <= LARGEST_SIZE for number in numbers):
            raise UserError(
                f"the rank plan's entry for {name} has something other than positive whole numbers"
            )
        loss = entry.expected_loss
        if loss is not None and not (type(loss) in (int, float) and 0 <= loss <= LARGEST_LOSS):
            raise UserError(
                f"the rank plan's entry for {name} has the expected_loss {loss!r:.40}; it is a number or null"
            )
    return entries


def _entry(plan: MatrixPlan) -> dict[str, Any]:
    """Plain values for JSON; what only nested models have is left out of others."""
    entry = asdict(plan)
    smaller = list(entry.pop("smaller_ranks"))
    return {**entry, **({"smaller_ranks": smaller} if smaller else {})}


def read_fractions(value: Any) -> tuple[float, ...]:
    """Those of a plan file, or a UserError."""
    if not isinstance(value, list) or len(value) == 1:
        raise UserError("the plan's fractions are not a list of two or more; make it again")
    if not all(type(fraction) in (int, float) and 0 < fraction < 1 for fraction in value):
        raise UserError("the plan's fractions are not shares between 0 and 1; make it again")
    if value != sorted(set(value), reverse=True):
        raise UserError("the plan's fractions do not fall; make it again")
    return tuple(value)


def _smaller(name: str, entry: MatrixPlan, sizes: int) -> tuple[int, ...]:
    """The entry's smaller ranks, or a UserError if they do not fit the plan's number of sizes."""
    ranks = entry.smaller_ranks
    wanted = 0 if entry.rank is None or not sizes else sizes - 1
    if not isinstance(ranks, (list, tuple)) or len(ranks) != wanted:
        raise UserError(f"the rank plan's entry for {name} has not {wanted} smaller_ranks")
    # type(), because True is an int, too.
    if not all(type(rank) is int and rank >= 1 for rank in ranks) or any(
        smaller > larger for larger, smaller in pairwise((entry.rank or 0, *ranks))
    ):
        raise UserError(f"the rank plan's entry for {name} has smaller_ranks that do not fall")
    return tuple(ranks)
