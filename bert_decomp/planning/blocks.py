"""Plans of structure: how many heads, dimensions and neurons each encoder layer keeps, and ranks on top of that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from ..errors import UserError
from ..models.attention_size import AttentionSize
from .plan import (
    MatrixPlan,
    embeddings_to_dict,
    flops_of,
    read_embeddings,
    read_fractions,
    total_loss,
)

VERSION = 2
PARTS = ("query", "key", "value", "attention_output", "ffn_intermediate", "ffn_output")


@dataclass(frozen=True)
class Sizes:
    """Of every layer of a dense encoder. ``gated``: the feed-forward has two matrices in, whose results are multiplied;
    ``rotary``: positions rotate query and key, which come from one joint matrix, so that heads keep their size."""

    width: int
    heads: int
    head_size: int
    neurons: int
    gated: bool = False
    rotary: bool = False

    @property
    def weights(self) -> int:
        """Of the matrices of one layer."""
        return LayerPlan.dense(self).weights(self)


@dataclass(frozen=True)
class LayerPlan:
    """What one encoder layer keeps. No heads: attention becomes a bias. No neurons: the feed-forward does.

    ``heads`` are those of the dense layer, by number; ``ranks`` has the parts (``PARTS``) that are two factors on top;
    ``expected_loss`` is the estimate that the allocation was made by, None if the plan was edited.
    """

    heads: tuple[int, ...]
    score_size: int
    value_size: int
    neurons: int
    ranks: dict[str, int] = field(default_factory=dict)
    expected_loss: float | None = None

    @classmethod
    def dense(cls, sizes: Sizes) -> LayerPlan:
        """The plan that leaves a layer as it is."""
        return cls(
            tuple(range(sizes.heads)), sizes.head_size, sizes.head_size, sizes.neurons, {}, 0.0
        )

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, int]]:
        """(out, in) of each part that is left."""
        scores, values = len(self.heads) * self.score_size, len(self.heads) * self.value_size
        shapes = {
            "query": (scores, sizes.width),
            "key": (scores, sizes.width),
            "value": (values, sizes.width),
            "attention_output": (sizes.width, values),
            "ffn_intermediate": (self.neurons * (2 if sizes.gated else 1), sizes.width),
            "ffn_output": (sizes.width, self.neurons),
        }
        return {part: shape for part, shape in shapes.items() if min(shape)}

    def matrices(self, sizes: Sizes) -> dict[str, MatrixPlan]:
        """Shape and rank of each part that is left."""
        return {
            part: MatrixPlan(columns, rows, self.ranks.get(part))
            for part, (rows, columns) in self.shapes(sizes).items()
        }

    def weights(self, sizes: Sizes) -> int:
        """Numbers held by the matrices that are left."""
        return sum(entry.weights for entry in self.matrices(sizes).values())

    def flops(self, sizes: Sizes, length: int) -> int:
        """Multiplications and additions a token in sentences of ``length`` tokens, attention included."""
        attention = 2 * length * len(self.heads) * (self.score_size + self.value_size)
        return 2 * self.weights(sizes) + attention

    @property
    def attention(self) -> AttentionSize:
        """Its heads and their sizes."""
        return AttentionSize(self.heads, self.score_size, self.value_size)

    def within(self, larger: LayerPlan) -> bool:
        """Whether this keeps only what ``larger`` does."""
        return self.neurons <= larger.neurons and self.attention.within(larger.attention)

    def check(self, name: str, sizes: Sizes) -> None:
        """Raise UserError unless a layer of ``sizes`` can become this."""
        numbers = (self.score_size, self.value_size, self.neurons, *self.heads)
        # type(), because True is an int, too.
        if not all(type(number) is int for number in (*numbers, *self.ranks.values())):
            raise UserError(f"the plan's entry for {name} has something else than whole numbers")
        if sorted(set(self.heads)) != list(self.heads) or not set(self.heads) <= set(
            range(sizes.heads)
        ):
            raise UserError(
                f"the plan gives {name} the heads {list(self.heads)!s:.60}; list some of 0 to "
                f"{sizes.heads - 1}, rising"
            )
        for kind, size, largest in (
            ("score_size", self.score_size, sizes.head_size),
            ("value_size", self.value_size, sizes.head_size),
        ):
            if not 1 <= size <= largest:
                raise UserError(f"the plan gives {name} the {kind} {size}; it is 1 to {largest}")
        if not 0 <= self.neurons <= sizes.neurons:
            raise UserError(
                f"the plan gives {name} {self.neurons} neurons; it has 0 to {sizes.neurons}"
            )
        if sizes.rotary:
            if {self.score_size, self.value_size} != {sizes.head_size} or not self.heads:
                raise UserError(
                    f"the plan resizes the heads of {name}, which rotary positions do not allow; drop whole "
                    "heads, not all"
                )
            if self.ranks:
                raise UserError(f"the plan factors parts of {name}, whose matrices are joint")
        shapes = self.shapes(sizes)
        for part, rank in self.ranks.items():
            if part not in shapes or not 1 <= rank <= min(shapes[part]):
                raise UserError(
                    f"the plan gives {part} of {name} rank {rank}; "
                    + (
                        f"it is 1 to {min(shapes[part])}"
                        if part in shapes
                        else "it has no such part"
                    )
                )


@dataclass(frozen=True)
class BlockPlan:
    """A ``LayerPlan`` for each encoder layer by qualified name, and the dense ``sizes`` that all of them had;
    ``embeddings`` as in ``RankPlan``.

    ``nested`` has the layers of every size of a nested model by encoder fraction, falling, of which the first are
    ``layers``; it is empty if there is one size.
    """

    sizes: Sizes
    layers: dict[str, LayerPlan]
    nested: dict[float, dict[str, LayerPlan]] = field(default_factory=dict)
    embeddings: dict[str, MatrixPlan] = field(default_factory=dict)

    @property
    def fractions(self) -> tuple[float, ...]:
        """What the sizes of a nested model are called."""
        return tuple(self.nested)

    def at(self, fraction: float) -> BlockPlan:
        """The plan of one size of a nested model."""
        return BlockPlan(self.sizes, self.nested[fraction], embeddings=self.embeddings)

    @property
    def encoder_fraction(self) -> float:
        """Weights kept, as a share of the dense matrices' weights."""
        kept = sum(layer.weights(self.sizes) for layer in self.layers.values())
        return kept / (len(self.layers) * self.sizes.weights)

    @property
    def flops(self) -> int:
        """Multiplications and additions a token, of the matrices and of the way up from an embedding's codes."""
        matrices = sum(2 * layer.weights(self.sizes) for layer in self.layers.values())
        return matrices + flops_of(self.embeddings)

    @property
    def expected_loss(self) -> float | None:
        """Sum over the layers and embeddings, if all are known."""
        layers = [entry.expected_loss for entry in self.layers.values()]
        return total_loss([*layers, *(entry.expected_loss for entry in self.embeddings.values())])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        smaller = list(self.nested.values())[1:]
        return {
            "version": VERSION,
            "encoder_fraction": self.encoder_fraction,
            "flops_per_token": self.flops,
            "expected_loss": self.expected_loss,
            "sizes": asdict(self.sizes),
            "layers": _entries(self.layers),
            **embeddings_to_dict(self.embeddings),
            **({"fractions": list(self.nested)} if self.nested else {}),
            **({"smaller": [_entries(layers) for layers in smaller]} if smaller else {}),
        }

    @classmethod
    def from_dict(cls, value: Any) -> BlockPlan:
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: it is of another version or malformed.
        """
        if not isinstance(value, dict) or value.get("version") != VERSION:
            raise UserError(f"this is not a plan of version {VERSION}; make it again")
        sizes, layers = value.get("sizes"), value.get("layers")
        if not isinstance(sizes, dict) or not isinstance(layers, dict) or not layers:
            raise UserError("the plan has no sizes or no layers; make it again")
        fractions, smaller = read_fractions(value.get("fractions", [])), value.get("smaller", [])
        if not isinstance(smaller, list) or len(smaller) != max(len(fractions) - 1, 0):
            raise UserError("the plan has not as many smaller sizes as fractions; make it again")
        try:
            dense = Sizes(**sizes)
        except TypeError as error:
            raise UserError(f"the plan is malformed ({error}); make it again") from error
        numbers = [getattr(dense, name) for name in ("width", "heads", "head_size", "neurons")]
        if not all(type(number) is int and 1 <= number < 2**31 for number in numbers):
            raise UserError("the plan's sizes are not positive whole numbers; make it again")
        plans = [_read_layers(entries, dense) for entries in (layers, *smaller)]
        for larger, other in pairwise(plans):
            if set(other) != set(larger):
                raise UserError("the plan's sizes are of other layers; make it again")
            for name, layer in other.items():
                if not layer.within(larger[name]):
                    raise UserError(
                        f"the plan's smaller size keeps more of {name} than the larger one; make it again"
                    )
        nested = dict(zip(fractions, plans, strict=True)) if fractions else {}
        return cls(dense, plans[0], nested, read_embeddings(value))


def _entries(layers: dict[str, LayerPlan]) -> dict[str, Any]:
    """Plain values for JSON."""
    return {name: {**asdict(layer), "heads": list(layer.heads)} for name, layer in layers.items()}


def _read_layers(value: Any, sizes: Sizes) -> dict[str, LayerPlan]:
    """What ``_entries`` wrote, or a UserError."""
    if not isinstance(value, dict) or not value:
        raise UserError("the plan has no layers; make it again")
    layers: dict[str, LayerPlan] = {}
    for name, entry in value.items():
        try:
            layer = LayerPlan(**entry)
        except TypeError as error:
            raise UserError(f"the plan is malformed ({error}); make it again") from error
        if not isinstance(layer.heads, list) or not isinstance(layer.ranks, dict):
            raise UserError(f"the plan's entry for {name} is malformed; make it again")
        loss = layer.expected_loss
        if loss is not None and not (type(loss) in (int, float) and 0 <= loss < 1e300):
            raise UserError(f"the plan's entry for {name} has the expected_loss {loss!r:.40}")
        layers[name] = replace(layer, heads=tuple(layer.heads))
        layers[name].check(name, sizes)
    return layers
