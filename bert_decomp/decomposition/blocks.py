"""``units`` other than single matrices, from the configuration to the decomposed model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import PAPER_FRACTION, DecompositionConfig
from ..engines import find_engine
from ..errors import UserError
from ..evaluation.metrics import evaluate, main_metric
from ..models.format import refuse_fused
from ..models.saving import mark_low_rank
from ..models.selection import select_linears
from ..planning import (
    budget_for_model,
    check_config,
    encoder_share,
    for_max_drop,
    read_plan,
    shapes_of,
)
from ..planning.blocks import BlockPlan, LayerPlan
from ..planning.costs import flops_cost
from ..planning.embedding import (
    WordEmbedding,
    parameters_saved,
    plan_with_embedding,
    planned_embedding,
)
from ..statistics import Statistics
from ..units import Layer, family_of, get_form, layers_of, sizes_of
from .apply import factored_embeddings
from .blocks_latency import plan_blocks_for_latency
from .drift import refit_
from .nested import check_nestable, nest_
from .structure import apply_blocks_, check_blocks, dense_blocks, plan_blocks

logger = logging.getLogger("bert_decomp")

# The smallest share of the weights that is searched for.
SMALLEST = 0.02


def check_request(model: PreTrainedModel, config: DecompositionConfig) -> None:
    """Raise UserError if no plan can meet ``config``, whatever its units; a model on ``meta`` will do."""
    refuse_fused(model, "decomposed")
    plan = None if config.plan_file is None else read_plan(config.plan_file)
    if config.latency_ms is not None:
        find_engine(config.engine_for(False), next(model.parameters()).device)
    if isinstance(plan, BlockPlan):
        check_blocks(model, plan)
    elif config.units == "matrices":
        check_config(model, config)
    elif plan is not None:
        raise UserError(
            f"plan_file is a plan of matrices; use units='matrices', not {config.units!r}"
        )
    else:
        _check_units(model, config)


def _check_units(model: PreTrainedModel, config: DecompositionConfig) -> None:
    form, sizes = get_form(config.units), sizes_of(model)
    if sizes.rotary and "scores" in form.blocks:
        raise UserError(
            "query, key and value of this model are one matrix and rotary positions stand between them; decompose it "
            "with units='structured'"
        )
    if config.nested_fractions is not None:
        check_nestable(sizes)
    if config.refit and family_of(model).attention_norm is None:
        raise UserError("refit needs layers that normalise after each half; leave it out")
    _share_of_weights(model, config, planned_embedding(model, config))


def _share_of_weights(
    model: PreTrainedModel, config: DecompositionConfig, embedding: WordEmbedding | None
) -> float:
    """The share of the encoder's weights, with the word embedding at the smallest of its ranks."""
    if config.model_fraction is not None:
        shapes = shapes_of(select_linears(model))
        return budget_for_model(model, shapes, config.model_fraction, SMALLEST, embedding)
    return config.encoder_fraction or PAPER_FRACTION


def decompose_blocks_(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    batches: list[dict[str, Tensor]] | None,
    *,
    plan: BlockPlan | None = None,
    held_out: list[dict[str, Tensor]] | None = None,
    fused: bool = False,
    progress: bool = True,
) -> BlockPlan:
    """Plan (unless there is a plan), apply and refit, in place; see ``decompose_``."""
    if statistics is None:
        raise UserError(
            f"units={config.units!r} needs statistics (gradients); give calibration batches, or what "
            "collect_statistics makes of them"
        )
    refit = _wants_refit(model, config)
    several = config.nested_fractions is not None or (plan is not None and plan.fractions)
    if several and batches is None:
        raise UserError("several sizes need the calibration batches; give them")
    if refit and batches is None:
        raise UserError("the refit needs the calibration batches; give them, or refit=False")
    layers = layers_of(model, statistics)
    if plan is None:
        plan = _plan(model, config, layers, statistics, held_out, fused, progress)
    if plan.fractions:
        check_nestable(layers[0].sizes, plan)
    teacher = copy.deepcopy(model) if refit else None
    _apply(model, layers, plan, statistics)
    if teacher is not None and batches is not None:
        refit_(model, teacher, layers, plan, batches, statistics, progress=progress)
    if plan.fractions and batches is not None:
        nest_(model, layers, plan, batches)
    return plan


def _apply(
    model: PreTrainedModel, layers: list[Layer], plan: BlockPlan, statistics: Statistics
) -> None:
    """Put the smaller layers and the word embedding of ``plan`` into ``model``, in place."""
    check_blocks(model, plan)
    embeddings = factored_embeddings(model, plan.embeddings, statistics)
    apply_blocks_(model, layers, plan)
    for name, module in embeddings.items():
        model.set_submodule(name, module)
    mark_low_rank(model)


def _wants_refit(model: PreTrainedModel, config: DecompositionConfig) -> bool:
    if config.refit is not None:
        return config.refit
    return family_of(model).attention_norm is not None


def _plan(
    model: PreTrainedModel,
    config: DecompositionConfig,
    layers: list[Layer],
    statistics: Statistics,
    held_out: list[dict[str, Tensor]] | None,
    fused: bool,
    progress: bool,
) -> BlockPlan:
    form, sizes = get_form(config.units), layers[0].sizes
    embedding = planned_embedding(model, config)
    if config.model_fraction is not None and embedding is not None:
        shapes, fraction = shapes_of(select_linears(model)), config.model_fraction
        return plan_with_embedding(
            embedding,
            statistics,
            lambda entry: encoder_share(model, shapes, fraction, parameters_saved(entry)),
            SMALLEST,
            lambda share: plan_blocks(layers, form, share) if share < 1 else dense_blocks(layers),
        )
    given = {} if embedding is None else embedding.given(statistics)
    if config.latency_ms is not None:
        engine = find_engine(config.engine_for(fused), next(model.parameters()).device)
        return plan_blocks_for_latency(
            model, config, layers, form, config.latency_ms, engine, given, progress=progress
        )
    if config.max_drop is not None:

        def apply(student: PreTrainedModel, plan: BlockPlan) -> None:
            _apply(student, layers, plan, statistics)

        return _plan_for_max_drop(
            model,
            config.max_drop,
            held_out,
            lambda share: replace(plan_blocks(layers, form, share), embeddings=given),
            apply,
        )
    if config.flops_fraction is not None:
        length = config.flops_seq_length
        dense = len(layers) * LayerPlan.dense(sizes).flops(sizes, length)
        budget = config.flops_fraction * dense
        plan = plan_blocks(layers, form, budget, flops_cost(sizes, length))
    elif config.nested_fractions is not None:
        plans: dict[float, BlockPlan] = {}
        for share in config.nested_fractions:
            within = plans[min(plans)] if plans else None
            plans[share] = plan_blocks(layers, form, share, within=within)
        plan = BlockPlan(sizes, plans[max(plans)].layers, {f: p.layers for f, p in plans.items()})
    else:
        plan = plan_blocks(layers, form, _share_of_weights(model, config, None))
    return replace(plan, embeddings=given)


def _plan_for_max_drop(
    model: PreTrainedModel,
    max_drop: float,
    held_out: list[dict[str, Tensor]] | None,
    allocate: Callable[[float], BlockPlan],
    apply: Callable[[PreTrainedModel, BlockPlan], None],
) -> BlockPlan:
    if not held_out or not all("labels" in batch for batch in held_out):
        raise UserError("max_drop needs labelled batches to measure it on; give held_out")

    @torch.inference_mode()
    def metric(form: nn.Module) -> float:
        values = evaluate(form, held_out, progress=False)
        return values[main_metric(values)]

    def metric_of_plan(plan: BlockPlan) -> float:
        student = copy.deepcopy(model).eval()
        apply(student, plan)
        return metric(student)

    return for_max_drop(max_drop / 100, metric(model), allocate, SMALLEST, metric_of_plan)
