"""Budgets of weights from other wishes: a share of the whole model, a share of the FLOPs, a drop of the metric.

Each ends in a share of the encoder matrices' weights, which an allocation then spreads over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ..errors import UserError
from .allocate import Shapes, rounded_up, weights_of
from .blocks import BlockPlan
from .embedding import WordEmbedding, parameters_saved
from .plan import RankPlan

Plan = TypeVar("Plan", RankPlan, BlockPlan)

# The largest share of the weights that for_max_drop tries: above it hardly anything is saved.
LARGEST_FRACTION = 0.98


def encoder_share(model: nn.Module, shapes: Shapes, fraction: float, saved: int = 0) -> float:
    """The share of its matrices that the encoder may keep where the whole model keeps ``fraction`` of its parameters.

    >>> round(encoder_share(nn.Linear(6, 6), {"layer": (6, 6)}, fraction=0.5), 4)
    0.4167

    Args:
        shapes: (out, in) of each matrix that is factored.
        saved: parameters that a factored embedding saves.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    encoder = weights_of(shapes)
    return (fraction * whole - (whole - encoder - saved)) / encoder


def budget_for_model(
    model: nn.Module,
    shapes: Shapes,
    fraction: float,
    least: float,
    embedding: WordEmbedding | None = None,
) -> float:
    """``encoder_share`` where the word embedding has the smallest of its ranks.

    Args:
        shapes: (out, in) of each matrix that is factored.
        least: the smallest encoder share that there is a plan for, above 0.
        embedding: the word embedding, if the plan may cut it.

    Raises:
        UserError: the parts that stay dense and ``least`` weigh more, or the rest meets it without a cut.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    encoder = weights_of(shapes)
    saved = 0 if embedding is None else parameters_saved(embedding.entry(embedding.ranks[0]))
    budget = encoder_share(model, shapes, fraction, saved)
    if budget < least:
        raise UserError(
            f"model_fraction {fraction:.4g} is below what the dense parts and the least ranks weigh; the smallest is "
            f"{rounded_up(1 - (encoder + saved - least * encoder) / whole)}"
        )
    if budget >= 1 and embedding is not None and not embedding.chosen_by_budget:
        raise UserError(
            f"model_fraction is {fraction:.4g}, but the factored embedding alone leaves {1 - saved / whole:.4f} of the "
            "model; give less than that"
        )
    return budget


def budget_for_flops(
    shapes: Shapes, fraction: float, length: int, layers: int, width: int, least: float
) -> float:
    """The encoder share at which a sentence of ``length`` tokens costs ``fraction`` of the dense encoder's FLOPs.

    Attention scores and contexts, 4 length width FLOPs a token and layer, cannot be factored.

    >>> round(budget_for_flops({"layer": (64, 64)}, 0.5, length=16, layers=1, width=64, least=0.1), 4)
    0.25

    Args:
        shapes: (out, in) of each matrix that is factored.
        layers: of the encoder.
        width: of the hidden states.
        least: the smallest encoder share that there is a plan for, above 0.

    Raises:
        UserError: attention and ``least`` cost more.
    """
    linear = 2 * weights_of(shapes)
    attention = 4 * length * width * layers
    budget = (fraction * (linear + attention) - attention) / linear
    if budget < least:
        raise UserError(
            f"flops_fraction {fraction:.4g} is below what attention and the least ranks cost at length {length}; the "
            f"smallest is {rounded_up((attention + least * linear) / (linear + attention))}"
        )
    return budget


def for_max_drop(
    max_drop: float,
    reference: float,
    allocate: Callable[[float], Plan],
    smallest: float,
    metric: Callable[[Plan], float],
    *,
    step: float = 0.02,
) -> Plan:
    """The smallest plan whose metric stays within ``max_drop`` of ``reference`` (both shares of 1), by bisection.

    Args:
        allocate: a plan for a share of the weights.
        smallest: the least share that ``allocate`` can make a plan for.
        metric: of the model with a plan applied, on a validation split; called about log2(1 / step) times.
        step: shares of the weights are told apart to this.

    Raises:
        UserError: not even the largest plan that compresses anything is good enough.
    """
    low, high = smallest, LARGEST_FRACTION
    best = allocate(high)
    value = metric(best)
    if value < reference - max_drop:
        raise UserError(
            f"no plan stays within {max_drop:.4g} of {reference:.4g}; keeping {high:.0%} of the weights gives "
            f"{value:.4f}, so allow at least {reference - value:.4f}"
        )
    while high - low > step:
        middle = (low + high) / 2
        plan = allocate(middle)
        if metric(plan) >= reference - max_drop:
            best, high = plan, middle
        else:
            low = middle
    return best
