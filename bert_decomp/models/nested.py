"""One set of factors for several sizes: a smaller size is a prefix of every matrix's ranks, with a bias of its own.

The best factors of rank r under a method's loss are the first r of those of any larger rank, so a prefix is where a
model that was decomposed at that size alone would start. Distillation trains all sizes at once
(``distillation.trainer``). A file holds a nested model; what is loaded of it is a plain model of one size, unless
``ALL`` are asked for, to train them further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from .resized import ResizedAttention
from .resized_entries import check_resized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What ``encoder_fraction`` is to keep all sizes.
ALL = "all"


class Nested(nn.Module):
    """A module of several sizes, called by their encoder ``fractions``, falling; ``fraction`` is the one in use."""

    def __init__(self, sizes: Mapping[float, Any]):
        super().__init__()
        self.fractions = tuple(sizes)
        self.fraction = self.fractions[0]

    def at(self, fraction: float) -> nn.Module:
        """The plain module of one size, with weights of its own."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What must be known to rebuild the module, as plain values."""
        raise NotImplementedError


class NestedLinear(Nested):
    """A ``LowRankLinear`` of several ranks, of which one is in use.

    ``down`` (largest rank, in_features) and ``up`` (out_features, largest rank) are shared, ``biases`` (sizes,
    out_features) are not: what a smaller rank leaves out has a mean. ``rank`` is the one in use.

    >>> layer = NestedLinear(8, 12, {0.5: 4, 0.25: 2})
    >>> layer(torch.ones(3, 8)).shape, layer.at(0.25)
    (torch.Size([3, 12]), LowRankLinear(in_features=8, out_features=12, rank=2, bias=True, parameters=52))

    Args:
        ranks: by encoder fraction, both falling.
        bias: whether there are ``biases``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Mapping[float, int],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(ranks)
        self.in_features, self.out_features = in_features, out_features
        self.ranks = dict(ranks)
        place = {"device": device, "dtype": dtype}
        largest = LowRankLinear(in_features, out_features, self.rank, False, **place)
        self.down, self.up = largest.down, largest.up
        self.biases = (
            nn.Parameter(torch.zeros(len(self.ranks), out_features, **place)) if bias else None
        )

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Mapping[float, LowRankLinear]) -> NestedLinear:
        """The nested form of ``layers`` by encoder fraction, falling, each of whose factors are a prefix of those
        before it."""
        largest = next(iter(layers.values()))
        ranks = {fraction: layer.rank for fraction, layer in layers.items()}
        nested = nn.utils.skip_init(
            cls,
            largest.in_features,
            largest.out_features,
            ranks,
            largest.bias is not None,
            device=largest.down.device,
            dtype=largest.down.dtype,
        )
        nested.down.copy_(largest.down), nested.up.copy_(largest.up)
        if nested.biases is not None:
            nested.biases.copy_(torch.stack([layer.bias for layer in layers.values()]))
        return nested.train(largest.training)

    @property
    def rank(self) -> int:
        return self.ranks[self.fraction]

    @property
    def bias(self) -> Tensor | None:
        """Of the size in use."""
        return None if self.biases is None else self.biases[self.fractions.index(self.fraction)]

    def forward(self, x: Tensor) -> Tensor:
        rank = self.rank
        return F.linear(F.linear(x, self.down[:rank]), self.up[:, :rank], self.bias)

    @torch.no_grad()
    def at(self, fraction: float) -> LowRankLinear:
        rank = self.ranks[fraction]
        bias = None if self.biases is None else self.biases[self.fractions.index(fraction)]
        layer = LowRankLinear.from_factors(self.down[:rank], self.up[:, :rank], bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}"
        )

    def describe(self) -> dict[str, Any]:
        ranks = {str(fraction): rank for fraction, rank in self.ranks.items()}
        return {"ranks": ranks, "bias": self.biases is not None}


def by_fraction(value: Any) -> dict[float, Any] | None:
    """A table by encoder fractions, which JSON has as text, falling; None if ``value`` is none of two sizes or more."""
    if not isinstance(value, dict):
        return None
    try:
        # transformers sorts a config's keys.
        names = sorted(value, key=float, reverse=True)
        sizes = {float(name): value[name] for name in names}
    except (TypeError, ValueError):
        return None
    fits = len(value) == len(sizes) >= 2 and all(0 < fraction < 1 for fraction in sizes)
    return sizes if fits else None


def ranks_of(entry: Any) -> dict[float, int] | None:
    """The ranks of what ``NestedLinear.describe`` gave, falling; None if ``entry`` has not its form."""
    if not isinstance(entry, dict) or set(entry) != {"ranks", "bias"}:
        return None
    ranks = by_fraction(entry["ranks"])
    if ranks is None or not isinstance(entry["bias"], bool):
        return None
    values = list(ranks.values())
    # type(), because True is an int, too.
    fits = all(type(rank) is int and rank >= 1 for rank in values)
    return ranks if fits and values == sorted(values, reverse=True) else None


def fractions_of(model: nn.Module) -> tuple[float, ...]:
    """The encoder fractions that a nested model serves, falling; none of a plain one."""
    for module in model.modules():
        if isinstance(module, Nested):
            return module.fractions
    return ()


def refuse_several(model: nn.Module, what: str) -> None:
    """Raise UserError if ``model`` has several sizes: then it cannot be ``what``."""
    if fractions_of(model):
        raise UserError(
            f"the model has several sizes and cannot be {what}; save it, and load one of them with encoder_fraction"
        )


def check_fraction(fractions: tuple[float, ...], wanted: Any) -> float:
    """``wanted`` if it is one of ``fractions``, and the largest for None.

    Raises:
        UserError: it is none of them.
    """
    if wanted is None:
        return fractions[0]
    if type(wanted) not in (int, float) or wanted not in fractions:
        sizes = ", ".join(map(str, fractions))
        raise UserError(f"encoder_fraction is {wanted}; this model has the sizes {sizes}")
    return wanted


def use_size_(model: nn.Module, fraction: float) -> None:
    """Let a nested model compute what its size ``fraction`` does, in place."""
    for module in model.modules():
        if isinstance(module, Nested):
            module.fraction = fraction
        elif isinstance(module, ResizedAttention) and module.nested:
            module.use(module.nested[fraction])


def take_size_(model: PreTrainedModel, fraction: float | None = None) -> PreTrainedModel:
    """Make of a nested model the plain one of one size, in place.

    Args:
        fraction: of the encoder; None takes the largest.

    Raises:
        UserError: the model is not nested, or has no such size.
    """
    fractions = fractions_of(model)
    if not fractions:
        raise UserError("the model has one size only; encoder_fraction is for nested ones")
    fraction = check_fraction(fractions, fraction)
    use_size_(model, fraction)
    for name, module in list(model.named_modules()):
        if isinstance(module, Nested):
            model.set_submodule(name, module.at(fraction))
        elif isinstance(module, ResizedAttention):
            module.nested = {}
    check_resized(model)
    if hasattr(model.config, "encoder_fraction"):
        del model.config.encoder_fraction
    return model
