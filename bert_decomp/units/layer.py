"""What a unit needs to know of one encoder layer: its matrices, and its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.architectures import FAMILIES, LINEARS, Family, encoder_layers, submodule
from ..planning.blocks import LayerPlan, Sizes
from ..planning.costs import weights_cost
from ..planning.option import Grid, Option
from ..statistics import LayerStatistics, Statistics
from .matrix import Matrix
from .registry import UNITS, Unit


class Matrices(Mapping[str, Matrix]):
    """An encoder layer's matrices by the part that they play (``LINEARS``), made when they are asked for."""

    def __init__(self, make: Callable[[str], Matrix]):
        self._make = make

    def __getitem__(self, part: str) -> Matrix:
        return self._make(part)

    def __iter__(self) -> Iterator[str]:
        return iter(LINEARS)

    def __len__(self) -> int:
        return len(LINEARS)


@dataclass
class Layer:
    """One encoder layer: ``matrices`` by the part that they play, its dense ``sizes``, and the units that were prepared
    for it."""

    name: str
    family: Family
    sizes: Sizes
    matrices: Mapping[str, Matrix]
    _units: dict[str, Unit] = field(default_factory=dict)
    _options: dict[tuple[str, Grid, bool], list[Option]] = field(default_factory=dict)
    _weights: dict[tuple[str, str, Grid, bool], np.ndarray] = field(default_factory=dict)

    def unit(self, name: str) -> Unit:
        """The unit called ``name``, prepared at the first call."""
        if name not in self._units:
            self._units[name] = UNITS[name](self)
        return self._units[name]

    def options(self, name: str, grid: Grid, factored: bool) -> list[Option]:
        """What the unit called ``name`` offers; listed once, for budgets are many."""
        key = (name, grid, factored)
        if key not in self._options:
            self._options[key] = self.unit(name).options(grid, factored)
        return self._options[key]

    def weights(self, block: str, name: str, grid: Grid, factored: bool) -> np.ndarray:
        """(options,): what each of them weighs in the block called ``block``; counted once."""
        key = (block, name, grid, factored)
        if key not in self._weights:
            cost = weights_cost(self.sizes)
            offered = self.options(name, grid, factored)
            self._weights[key] = np.array([cost(block, one) for one in offered])
        return self._weights[key]

    def dense(self) -> LayerPlan:
        """The plan that leaves the layer as it is."""
        return LayerPlan.dense(self.sizes)


def family_of(model: PreTrainedModel) -> Family:
    """The model's row in ``FAMILIES``.

    Raises:
        UserError: it has none.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise UserError(
            f"{model.config.model_type} is an architecture without a row in bert_decomp/models/architectures.py; "
            f"heads and neurons can be taken from {', '.join(sorted(FAMILIES))} only: decompose it with "
            "units='matrices'"
        )
    return family


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of every layer of a dense encoder.

    Raises:
        UserError: the architecture is unknown, or a layer is not dense any more.
    """
    family, heads = family_of(model), model.config.num_attention_heads
    sizes = set()
    for name, layer in encoder_layers(model).items():
        linears: dict[str, nn.Linear] = {}
        for part in LINEARS:
            linear = layer.get_submodule(getattr(family, part))
            if type(linear) is not nn.Linear:
                raise UserError(
                    f"{name}.{getattr(family, part)} is decomposed already; give the dense model"
                )
            linears[part] = linear
        output, last = linears["attention_output"], linears["ffn_output"]
        first = linears["ffn_intermediate"]
        sizes.add(
            Sizes(
                output.out_features,
                heads,
                output.in_features // heads,
                last.in_features,
                gated=first.out_features == 2 * last.in_features,
                rotary=family.query == family.key,
            )
        )
    if len(sizes) != 1:
        raise UserError("the encoder's layers differ in size; decompose it with units='matrices'")
    return sizes.pop()


def layers_of(model: PreTrainedModel, statistics: Statistics) -> list[Layer]:
    """The layers of a dense encoder, in order, with what ``statistics`` (with gradients) say of them.

    Raises:
        UserError: the architecture is not supported, or statistics are missing or of another model.
    """
    family, sizes = family_of(model), sizes_of(model)
    dense: dict[str, tuple[Tensor, Tensor | None, LayerStatistics]] = {}
    for name, module in encoder_layers(model).items():
        for part in LINEARS:
            linear = submodule(module, getattr(family, part), nn.Linear)
            known = statistics.of(f"{name}.{getattr(family, part)}", ("gradients",))
            if known.width != linear.in_features:
                raise UserError(
                    f"the statistics of {known.name} are {known.width} wide but the layer reads "
                    f"{linear.in_features}; collect them again for this model"
                )
            # Copies, because the model may be decomposed and refitted in place.
            bias = None if linear.bias is None else linear.bias.detach().clone()
            dense[known.name] = linear.weight.detach().clone(), bias, known

    # In float64 the matrices of all layers are as large as the statistics; stages go through one layer after another.
    @lru_cache(maxsize=len(LINEARS))
    def matrix(name: str, part: str) -> Matrix:
        weight, bias, known = dense[f"{name}.{getattr(family, part)}"]
        made = Matrix.of(weight, bias, known.to(weight.device))
        index = LINEARS.index(part)
        return made.third(index) if sizes.rotary and index < 3 else made

    return [
        Layer(name, family, sizes, Matrices(partial(matrix, name)))
        for name in encoder_layers(model)
    ]
