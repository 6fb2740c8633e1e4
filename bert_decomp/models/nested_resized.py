"""Fewer heads and neurons in several sizes: a smaller size takes rows and columns of the larger one's matrices.

Of each head that it keeps, a smaller size has the first dimensions, and the first of the neurons; ``decomposition.
nested`` puts the most important ones first. Biases are each size's own, as in ``nested``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_size import AttentionSize
from .nested import Nested, by_fraction
from .resized import Constant, Removed, ResizedAttention, ResizedLinear
from .resized_entries import is_description, rebuild_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .architectures import Family


@dataclass(frozen=True)
class Kept:
    """Which rows or columns of a matrix a size has: of each of ``groups``, which are ``size`` wide, the ``first``.

    >>> Kept((0, 2), 4, 3).indices().tolist()
    [0, 1, 2, 8, 9, 10]
    """

    groups: tuple[int, ...]
    size: int
    first: int

    def __len__(self) -> int:
        return len(self.groups) * self.first

    def indices(self, device: torch.device | None = None) -> Tensor:
        return _indices(self, device)

    @classmethod
    def read(cls, value: Any, width: int) -> Kept | None:
        """Of [groups, size, first], as JSON has it; None if it is of another form or beyond ``width``."""
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], list):
            return None
        groups, size, first = value
        # type(), because True is an int, too.
        if not all(
            type(number) is int and 0 <= number < 2**31 for number in (*groups, size, first)
        ):
            return None
        if (
            groups != sorted(set(groups))
            or first > size
            or (groups and (groups[-1] + 1) * size > width)
        ):
            return None
        return cls(tuple(groups), size, first)


@lru_cache(maxsize=1024)
def _indices(kept: Kept, device: torch.device | None) -> Tensor:
    groups = torch.tensor(kept.groups, dtype=torch.long, device=device)
    return (groups[:, None] * kept.size + torch.arange(kept.first, device=device)).flatten()


class NestedResized(Nested):
    """A ``ResizedLinear`` of several sizes, of which one is in use.

    ``weight`` (out_features, in_features) is the largest's, ``biases`` (sizes, out_features) has each size's bias at
    the rows that it keeps. A size without columns is its bias alone; one without rows hands its input on, as
    ``Removed`` does.

    >>> layer = NestedResized(4, 6, {0.5: (Kept((0, 1), 3, 3), Kept((0,), 4, 4)),
    ...     0.25: (Kept((1,), 3, 2), Kept((0,), 4, 4))})
    >>> layer(torch.ones(5, 4)).shape, layer.at(0.25)
    (torch.Size([5, 6]), ResizedLinear(in_features=4, out_features=2, bias=True))

    Args:
        sizes: rows and columns of each size by encoder fraction, falling; the first keeps all.
        scaled: whether a size's weight and bias stand for query: scores are divided by the root of the size of a head,
            which the query makes up for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sizes: Mapping[float, tuple[Kept, Kept]],
        scaled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(sizes)
        self.in_features, self.out_features = in_features, out_features
        self.sizes, self.scaled = dict(sizes), scaled
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, **place))
        self.biases = nn.Parameter(torch.zeros(len(sizes), out_features, **place))

    def scale(self, fraction: float) -> float:
        """What a size multiplies the shared weight by; its bias has it in it."""
        largest = self.sizes[self.fractions[0]][0].first
        return (self.sizes[fraction][0].first / largest) ** 0.5 if self.scaled else 1.0

    def _slice(self, fraction: float) -> tuple[Tensor, Tensor]:
        """Weight and bias of a size."""
        rows, columns = (kept.indices(self.weight.device) for kept in self.sizes[fraction])
        bias = self.biases[self.fractions.index(fraction)]
        if fraction == self.fractions[0]:
            return self.weight, bias
        weight = self.weight if len(rows) == len(self.weight) else self.weight[rows]
        weight = weight if len(columns) == self.in_features else weight[:, columns]
        return weight * self.scale(fraction), bias[rows]

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.sizes[self.fraction]
        if not len(rows):
            return x
        weight, bias = self._slice(self.fraction)
        return F.linear(x, weight, bias) if len(columns) else bias.expand(*x.shape[:-1], -1)

    @torch.no_grad()
    def at(self, fraction: float) -> nn.Module:
        rows, columns = (len(kept) for kept in self.sizes[fraction])
        weight, bias = self._slice(fraction)
        place = {"device": weight.device, "dtype": weight.dtype}
        if not rows:
            return Removed()
        if not columns:
            constant = Constant(rows, **place)
            constant.bias.copy_(bias)
            return constant.train(self.training)
        linear = nn.utils.skip_init(ResizedLinear, columns, rows, **place)
        linear.weight.copy_(weight), linear.bias.copy_(bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, sizes={len(self.sizes)}"

    def describe(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scaled": self.scaled,
            "sizes": {
                str(fraction): [[list(kept.groups), kept.size, kept.first] for kept in sides]
                for fraction, sides in self.sizes.items()
            },
        }


def resized_sizes(entry: Any) -> dict[float, tuple[Kept, Kept]] | None:
    """The sizes of what ``NestedResized.describe`` gave, falling; None if ``entry`` has not its form."""
    if not isinstance(entry, dict) or set(entry) != {
        "in_features",
        "out_features",
        "scaled",
        "sizes",
    }:
        return None
    widths = entry["out_features"], entry["in_features"]
    named = by_fraction(entry["sizes"])
    if named is None or not all(type(width) is int and 1 <= width < 2**31 for width in widths):
        return None
    sizes: dict[float, tuple[Kept, Kept]] = {}
    for fraction, sides in named.items():
        if not isinstance(sides, list) or len(sides) != 2:
            return None
        rows, columns = (Kept.read(side, width) for side, width in zip(sides, widths, strict=True))
        if rows is None or columns is None:
            return None
        sizes[fraction] = rows, columns
    largest = next(iter(sizes.values()))
    whole = tuple(map(len, largest)) == widths and isinstance(entry["scaled"], bool)
    return sizes if whole else None


def attention_sizes(entry: Any) -> dict[float, AttentionSize] | None:
    """The sizes of nested attention, falling; None if ``entry`` has not their form: ``sizes`` of heads, score size and
    value size by encoder fraction."""
    if not isinstance(entry, dict) or set(entry) != {"attention"}:
        return None
    named = by_fraction(entry["attention"])
    if named is None:
        return None
    sizes: dict[float, AttentionSize] = {}
    for fraction, value in named.items():
        if not isinstance(value, list) or len(value) != 3:
            return None
        described = dict(zip(("heads", "score_size", "value_size"), value, strict=True))
        if not is_description(described):
            return None
        sizes[fraction] = AttentionSize(tuple(value[0]), value[1], value[2])
    largest = next(iter(sizes.values()))
    return sizes if all(size.within(largest) for size in sizes.values()) else None


def describe_attention(module: ResizedAttention) -> dict[str, Any]:
    """What must be known to rebuild nested attention, as plain values."""
    return {
        "attention": {
            str(fraction): [list(size.heads), size.score_size, size.value_size]
            for fraction, size in module.nested.items()
        }
    }


def rebuild_nested_(
    model: PreTrainedModel, name: str, entry: dict[str, Any], family: Family | None
) -> None:
    """Put a nested module of ``describe``, yet without values, in the place of the architecture's own.

    Raises:
        UserError: that module cannot have those sizes.
    """
    sizes = resized_sizes(entry)
    if sizes is None:
        attention = attention_sizes(entry)
        assert attention is not None
        largest = next(iter(attention.values()))
        described = {**vars(largest), "heads": list(largest.heads)}
        rebuild_(model, name, described, family)
        model.get_submodule(name).nested = attention
        return
    rows, columns = entry["out_features"], entry["in_features"]
    rebuild_(model, name, {"in_features": columns, "out_features": rows, "bias": True}, family)
    plain = model.get_submodule(name)
    assert isinstance(plain, ResizedLinear)
    place = {"device": plain.weight.device, "dtype": plain.weight.dtype}
    model.set_submodule(name, NestedResized(columns, rows, sizes, entry["scaled"], **place))
