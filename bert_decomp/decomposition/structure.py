"""Structure: choosing what every layer's blocks become within a budget, and putting the smaller layers in place.

Matrices that act only together become smaller together (see ``units``), in a ``BlockPlan`` that one auction makes over
all blocks of the encoder. Two factors may stand on top of the smaller matrices.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..models.architectures import Family, encoder_layers
from ..models.resized import Constant, Removed, ResizedLinear, attention_name, resize_attention_
from ..planning.auction import auction
from ..planning.blocks import BlockPlan, LayerPlan, Sizes
from ..planning.costs import HEAD_SHARE, Cost
from ..planning.embedding import check_embeddings
from ..units import Form, Layer, Matrix, Option, sizes_of


@torch.no_grad()
def plan_blocks(
    layers: list[Layer],
    form: Form,
    budget: float,
    cost: Cost | None = None,
    within: BlockPlan | None = None,
) -> BlockPlan:
    """The plan that loses least within a budget.

    Args:
        layers: as ``layers_of`` prepares them.
        form: which blocks are chosen together, and what they are offered.
        budget: in the unit of ``cost``, over all layers; without ``cost``, a share of the encoder's weights.
        within: a plan of which only what it keeps may be kept.

    Raises:
        UserError: the budget is impossible, or the architecture does not have this form.
    """
    sizes = layers[0].sizes
    if sizes.rotary and "scores" in form.blocks:
        raise UserError(
            "query, key and value are one matrix and rotary positions stand between them; decompose this model "
            "with units='structured'"
        )
    if cost is None:
        if not 0 < budget < 1:
            raise UserError(f"the budget of weights is {budget}; give a share between 0 and 1")
        budget *= len(layers) * sizes.weights
    options: dict[tuple[str, str], list[Option]] = {}
    costs: dict[tuple[str, str], np.ndarray] = {}
    for layer in layers:
        for block, unit in form.blocks.items():
            key = layer.name, block
            options[key] = offered = layer.options(unit, form.grid, form.factored)
            if cost is None:
                costs[key] = layer.weights(block, unit, form.grid, form.factored)
            else:
                costs[key] = np.array([cost(block, one) for one in offered])
            if within is not None:
                kept = [one.within(within.layers[layer.name]) for one in offered]
                options[key], costs[key] = list(compress(offered, kept)), costs[key][kept]
    losses = {key: np.array([one.loss for one in many]) for key, many in options.items()}
    extra = None
    if cost is None:
        price = HEAD_SHARE * 4 * sizes.width * sizes.head_size
        extra = {
            key: np.array([price * len(one.sizes.get("heads", ())) for one in many])
            for key, many in options.items()
        }
    choice = auction(losses, costs, budget, extra)
    plans = {layer.name: replace(layer.dense(), expected_loss=0.0) for layer in layers}
    for (name, block), index in choice.items():
        plans[name] = options[name, block][index].apply(plans[name])
    return BlockPlan(sizes, plans)


def dense_blocks(layers: list[Layer]) -> BlockPlan:
    """The plan that leaves every layer as it is."""
    return BlockPlan(layers[0].sizes, {layer.name: layer.dense() for layer in layers})


@torch.no_grad()
def reduced(layer: Layer, plan: LayerPlan) -> dict[str, Matrix]:
    """The matrices of a layer, by part, at the sizes of ``plan``, before any two factors on top."""
    matrices: dict[str, Matrix] = {}
    for unit in ("scores", "values", "neurons"):
        matrices.update(layer.unit(unit).reduce(plan))
    return matrices


@torch.no_grad()
def apply_blocks_(model: PreTrainedModel, layers: list[Layer], plan: BlockPlan) -> None:
    """Put the smaller layers of ``plan`` into ``model``, in place.

    Raises:
        UserError: the plan is of another model; the model stays as it was.
    """
    check_blocks(model, plan)
    made = {layer.name: _modules(layer, plan.layers[layer.name]) for layer in layers}
    for layer in layers:
        module = model.get_submodule(layer.name)
        install_(module, layer.family, layer.sizes, plan.layers[layer.name], made[layer.name])


def check_blocks(model: PreTrainedModel, plan: BlockPlan) -> None:
    """Raise UserError unless ``plan`` is of this dense model."""
    sizes = sizes_of(model)
    if sizes != plan.sizes:
        raise UserError(f"the plan is of layers of {plan.sizes}, the model's have {sizes}")
    if set(plan.layers) != set(encoder_layers(model)):
        raise UserError("the plan's layers are not those of this model; make it again")
    for name, layer in plan.layers.items():
        layer.check(name, sizes)
    check_embeddings(model, plan.embeddings)


def install_(
    module: nn.Module,
    family: Family,
    sizes: Sizes,
    plan: LayerPlan,
    parts: dict[str, nn.Module],
) -> None:
    """Put ``parts`` into one encoder layer and tell its attention of its sizes."""
    dense = LayerPlan.dense(sizes)
    attention = (plan.heads, plan.score_size, plan.value_size)
    if not sizes.rotary and attention != (dense.heads, dense.score_size, dense.value_size):
        resize_attention_(module.get_submodule(attention_name(family)), family, *attention)
    for part, replacement in parts.items():
        old = module.get_submodule(getattr(family, part))
        reference = next(old.parameters())
        module.set_submodule(
            getattr(family, part),
            replacement.to(reference.device, reference.dtype).train(old.training),
        )


def _modules(layer: Layer, plan: LayerPlan) -> dict[str, nn.Module]:
    """By part, what takes the place of a dense linear layer; parts that stay as they are are absent."""
    matrices, dense = reduced(layer, plan), layer.dense().shapes(layer.sizes)
    made: dict[str, nn.Module] = {}
    names = ("query", "key", "value") if layer.sizes.rotary else ()
    if names and len(plan.heads) < layer.sizes.heads:
        made["query"] = _linear(_joint([matrices.pop(part) for part in names]))
    for part, matrix in matrices.items():
        if part in plan.ranks:
            made[part] = _low_rank(matrix, plan.ranks[part])
        elif part not in names and tuple(matrix.weight.shape) != dense[part]:
            made[part] = _linear(matrix) if matrix.weight.shape[1] else _constant(matrix)
    if not plan.heads:
        made.update({part: Removed() for part in ("query", "key", "value")})
    if not plan.neurons:
        made["ffn_intermediate"] = Removed()
    return made


def _joint(matrices: list[Matrix]) -> Matrix:
    """Query, key and value in one matrix; only its weight and bias mean something."""
    biased = any(matrix.bias is not None for matrix in matrices)
    return replace(
        matrices[0],
        weight=torch.cat([matrix.weight for matrix in matrices]),
        bias=torch.cat([matrix.bias_or_zero for matrix in matrices]) if biased else None,
    )


def _linear(matrix: Matrix) -> ResizedLinear:
    rows, columns = matrix.weight.shape
    linear = nn.utils.skip_init(ResizedLinear, columns, rows, bias=matrix.bias is not None)
    _fill(linear, weight=matrix.weight, bias=matrix.bias)
    return linear


def _low_rank(matrix: Matrix, rank: int) -> LowRankLinear:
    rows, columns = matrix.weight.shape
    down, up, bias = matrix.factors(rank)
    linear = nn.utils.skip_init(LowRankLinear, columns, rows, rank, True)
    _fill(linear, down=down, up=up, bias=bias)
    return linear


def _constant(matrix: Matrix) -> Constant:
    constant = Constant(len(matrix.weight))
    _fill(constant, bias=matrix.bias)
    return constant


def _fill(module: nn.Module, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None:
            getattr(module, name).copy_(value)
