"""Heads and neurons in several sizes: ordering the largest model's coordinates, and making its layers nested.

The units list what they keep in an order of importance, so plans of falling budgets are nested: fewer of the heads, of
each head's dimensions, of the neurons. The largest model is decomposed as it would be alone. Its coordinates are then
turned, exactly, so that the first ones of every head and of the neurons are those that a smaller size keeps; what a
smaller size leaves out has a mean, which its own biases take over.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..methods import Metric, balanced, shrunk, solve
from ..models.architectures import encoder_layers
from ..models.nested_resized import Kept, NestedResized
from ..models.resized import ResizedAttention, attention_name, resize_attention_
from ..models.saving import mark_low_rank
from ..planning.blocks import BlockPlan, LayerPlan, Sizes
from ..statistics import collect_statistics, collected
from ..units import Layer
from ..units.neurons import Neurons
from ..units.scores import Scores

SHRINK = 0.01
Moments = dict[tuple[str, str], tuple[Tensor, Tensor]]
OUTPUTS = ("attention_output", "ffn_output")


@torch.no_grad()
def nest_(
    model: PreTrainedModel, layers: list[Layer], plan: BlockPlan, batches: list[dict[str, Tensor]]
) -> None:
    """Make the layers of ``model`` nested, in place.

    Args:
        model: decomposed by ``plan``, whose largest size it has.
        layers: the dense model's, as ``layers_of`` prepares them.
        batches: padded inputs, of which the means are taken.

    Raises:
        UserError: a layer is not what the plan says.
    """
    moments = _moments(model, layers, batches)
    modules = encoder_layers(model)
    for layer in layers:
        sizes = [entries[layer.name] for entries in plan.nested.values()]
        if all(size == sizes[0] for size in sizes):
            continue
        _Order(modules[layer.name], layer, sizes[0], moments).turn_()
        _wrap(modules[layer.name], layer, dict(zip(plan.fractions, sizes, strict=True)), moments)
    mark_low_rank(model)


def check_nestable(sizes: Sizes, plan: BlockPlan | None = None) -> None:
    """Raise UserError unless models of these dense sizes, and of ``plan`` if it is made, can be nested."""
    if sizes.rotary or sizes.gated:
        raise UserError(
            "nested_fractions with units='structured' is not for gated feed-forwards or rotary positions; use "
            "units='matrices'"
        )
    nested = plan.nested if plan is not None else {}
    if any(layer.ranks for entries in nested.values() for layer in entries.values()):
        raise UserError("a plan of several sizes has no two factors on top; make it again")


def _moments(
    model: PreTrainedModel, layers: list[Layer], batches: list[dict[str, Tensor]]
) -> Moments:
    """Mean and covariance of what enters the two output matrices of each layer, real tokens only, float64."""
    modules, device = encoder_layers(model), next(model.parameters()).device
    places = list(product(layers, OUTPUTS))
    watched = {
        f"{layer.name}.{part}": modules[layer.name].get_submodule(getattr(layer.family, part))
        for layer, part in places
    }
    statistics = collect_statistics(model, batches, watched, progress=False)
    moments: Moments = {}
    for layer, part in places:
        inputs = collected(statistics.of(f"{layer.name}.{part}").inputs)
        moments[layer.name, part] = inputs.mean.to(device), inputs.covariance.to(device)
    return moments


class _Order:
    """The turning of one layer of the largest size: what it computes stays, up to rounding."""

    def __init__(self, module: nn.Module, layer: Layer, plan: LayerPlan, moments: Moments):
        self._module, self._layer, self._plan, self._moments = module, layer, plan, moments

    def turn_(self) -> None:
        if self._plan.heads:
            self._turn_scores()
            self._turn_values()
        if self._plan.neurons:
            self._turn_neurons()

    def _linear(self, part: str) -> nn.Linear:
        linear = self._module.get_submodule(getattr(self._layer.family, part))
        assert isinstance(linear, nn.Linear)
        return linear

    def _turn_scores(self) -> None:
        """Of heads of the full size, whose dimensions are still the dense model's."""
        size, scores = self._plan.score_size, self._layer.unit("scores")
        assert isinstance(scores, Scores)
        if size < self._layer.sizes.head_size:
            return
        for place, head in enumerate(self._plan.heads):
            up, down = scores.basis(head)
            down, up = balanced(down, up)
            rows = slice(place * size, (place + 1) * size)
            _multiply(self._linear("query"), rows, down)
            _multiply(self._linear("key"), rows, up.T)

    def _turn_values(self) -> None:
        """By the part of the output that the context explains, head by head."""
        output, value = self._linear("attention_output"), self._linear("value")
        mean, covariance = self._moments[self._layer.name, "attention_output"]
        covariance = shrunk(covariance, SHRINK)
        outputs, size = (
            self._layer.matrices["attention_output"].metric().outputs,
            self._plan.value_size,
        )
        for place in range(len(self._plan.heads)):
            own = slice(place * size, (place + 1) * size)
            metric = Metric(covariance[own, own], outputs)
            _, up, down = solve(output.weight[:, own].double(), metric, size)
            down, up = balanced(down, up)
            output.weight[:, own] = up.to(output.weight.dtype)
            _multiply(value, own, down)
            mean[own] = down @ mean[own]

    def _turn_neurons(self) -> None:
        neurons = self._layer.unit("neurons")
        assert isinstance(neurons, Neurons)
        kept = neurons.order[: self._plan.neurons]
        # They stand in the model by their number.
        order = kept.argsort().argsort()
        first, second = self._linear("ffn_intermediate"), self._linear("ffn_output")
        first.weight.copy_(first.weight[order])
        if first.bias is not None:
            first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
        mean, covariance = self._moments[self._layer.name, "ffn_output"]
        self._moments[self._layer.name, "ffn_output"] = mean[order], covariance


def _multiply(linear: nn.Linear, rows: slice, matrix: Tensor) -> None:
    """``matrix`` times those rows of weight and bias."""
    linear.weight[rows] = (matrix @ linear.weight[rows].double()).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] = (matrix @ linear.bias[rows].double()).to(linear.bias.dtype)


def _wrap(module: nn.Module, layer: Layer, sizes: dict[float, LayerPlan], moments: Moments) -> None:
    """Nested modules in the place of one layer's linear ones."""
    largest, family = next(iter(sizes.values())), layer.family
    width = Kept((0,), layer.sizes.width, layer.sizes.width)

    def of_heads(size: int, firsts: dict[float, int]) -> dict[float, Kept]:
        return {
            fraction: Kept(
                tuple(largest.heads.index(head) for head in sizes[fraction].heads),
                size,
                first if sizes[fraction].heads else 0,
            )
            for fraction, first in firsts.items()
        }

    scores = of_heads(largest.score_size, {f: plan.score_size for f, plan in sizes.items()})
    values = of_heads(largest.value_size, {f: plan.value_size for f, plan in sizes.items()})
    neurons = {
        fraction: Kept((0,), largest.neurons, plan.neurons) for fraction, plan in sizes.items()
    }
    parts = {
        "query": (scores, None),
        "key": (scores, None),
        "value": (values, None),
        "attention_output": (None, values),
        "ffn_intermediate": (neurons, None),
        "ffn_output": (None, neurons),
    }
    shapes = largest.shapes(layer.sizes)
    if largest.heads:
        attention = module.get_submodule(attention_name(family))
        resize_attention_(attention, family, largest.heads, largest.score_size, largest.value_size)
        assert isinstance(attention, ResizedAttention)
        attention.nested = {fraction: plan.attention for fraction, plan in sizes.items()}
    for part, sides in parts.items():
        if part not in shapes:
            continue
        linear = module.get_submodule(getattr(family, part))
        assert isinstance(linear, nn.Linear)
        rows, columns = (dict.fromkeys(sizes, width) if side is None else side for side in sides)
        nested = NestedResized(
            linear.in_features,
            linear.out_features,
            {fraction: (rows[fraction], columns[fraction]) for fraction in sizes},
            scaled=part == "query",
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        nested.weight.copy_(linear.weight)
        if linear.bias is not None:
            for place, fraction in enumerate(sizes):
                nested.biases[place] = nested.scale(fraction) * linear.bias
        if part in OUTPUTS:
            mean, _ = moments[layer.name, part]
            for place, fraction in enumerate(sizes):
                gone = mean.clone()
                gone[columns[fraction].indices(mean.device)] = 0
                nested.biases[place] += (linear.weight.double() @ gone).to(linear.weight.dtype)
        module.set_submodule(getattr(family, part), nested.train(linear.training))
