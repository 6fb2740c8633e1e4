"""``units`` other than single matrices, from the configuration to the decomposed model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..config import PAPER_FRACTION, DecompositionConfig
from ..engines import Engine, find_engine
from ..errors import UserError
from ..evaluation.latency import median_ratio, random_inputs, take_turns
from ..evaluation.metrics import evaluate, main_metric
from ..models.architectures import encoder_layers
from ..models.format import refuse_fused
from ..models.resized import Constant, Removed, ResizedLinear
from ..models.saving import mark_low_rank
from ..models.selection import select_linears
from ..planning import (
    MatrixPlan,
    budget_for_model,
    check_config,
    encoder_share,
    for_max_drop,
    read_plan,
    shapes_of,
)
from ..planning.blocks import BlockPlan, LayerPlan, Sizes
from ..planning.costs import BlockTable, flops_cost
from ..planning.embedding import (
    WordEmbedding,
    parameters_saved,
    plan_with_embedding,
    planned_embedding,
)
from ..statistics import Statistics
from ..units import Form, Layer, family_of, get_form, layers_of, sizes_of
from .apply import factored_embeddings
from .drift import refit_
from .nested import check_nestable, nest_
from .search import with_random_embeddings
from .structure import apply_blocks_, check_blocks, dense_blocks, install_, plan_blocks

logger = logging.getLogger("bert_decomp")

# A measured latency this near to the target is taken, and how many plans are measured for it at most.
TOLERANCE, ROUNDS = 0.05, 6
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
        refit_(model, teacher, layers, plan, batches, progress=progress)
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


def random_blocks_twin(model: PreTrainedModel, plan: BlockPlan) -> PreTrainedModel:
    """A copy of ``model`` with the sizes of ``plan`` and random weights: it takes as long as the student would."""
    twin, family = copy.deepcopy(model).eval(), family_of(model)
    for name, layer in encoder_layers(twin).items():
        parts = _random_parts(plan.sizes, plan.layers[name])
        install_(layer, family, plan.sizes, plan.layers[name], parts)
    return with_random_embeddings(twin, plan.embeddings)


def _random_parts(sizes: Sizes, plan: LayerPlan) -> dict[str, nn.Module]:
    shapes, dense = plan.shapes(sizes), LayerPlan.dense(sizes).shapes(sizes)
    parts: dict[str, nn.Module] = {}
    for part, (rows, columns) in shapes.items():
        if part in plan.ranks:
            parts[part] = LowRankLinear(columns, rows, plan.ranks[part])
        elif (rows, columns) != dense[part]:
            parts[part] = ResizedLinear(columns, rows)
    if sizes.rotary:
        rows = sum(shapes[part][0] for part in ("query", "key", "value"))
        joint = ResizedLinear(sizes.width, rows)
        parts = {part: value for part, value in parts.items() if part not in ("key", "value")}
        if "query" in parts:
            parts["query"] = joint
    for left, gone in (
        ("attention_output", ("query", "key", "value")),
        ("ffn_output", ("ffn_intermediate",)),
    ):
        if left not in shapes:
            parts[left] = Constant(sizes.width)
            parts.update({part: Removed() for part in gone})
    return parts


def plan_blocks_for_latency(
    model: PreTrainedModel,
    config: DecompositionConfig,
    layers: list[Layer],
    form: Form,
    target: float,
    engine: Engine,
    embeddings: dict[str, MatrixPlan] | None = None,
    *,
    seconds: float = 1.0,
    progress: bool = False,
) -> BlockPlan:
    """The plan that loses least within ``target`` milliseconds for one batch, measured on this machine in ``engine``.

    A table of measured shapes prices the options; what a plan really takes, measured against the dense model in turns,
    says what the table's times are worth, and the next plan is sought.

    Raises:
        UserError: the dense model is fast enough already, or no plan is.
    """
    parameter = next(model.parameters())
    inputs = random_inputs(model, config.latency_batch_size, config.latency_seq_length)
    model.eval()
    with torch.no_grad():
        dense_call = engine.model(model, inputs)

    @torch.inference_mode()
    def against_dense(plan: BlockPlan | None) -> tuple[float, float]:
        """Milliseconds of the dense model, and of the plan as a share of that."""
        calls = {"dense": dense_call}
        if plan is not None:
            with torch.inference_mode(False), torch.no_grad():
                calls["plan"] = engine.model(random_blocks_twin(model, plan), inputs)
        times = take_turns(calls, seconds, cuda=parameter.is_cuda)
        dense = 1e3 * float(np.median(times["dense"]))
        return dense, 1.0 if plan is None else median_ratio(times["plan"], times["dense"])

    dense_ms, _ = against_dense(None)
    if target >= dense_ms:
        raise UserError(
            f"the target of {target:.3g} ms is no less than what the dense model takes, {dense_ms:.3g} ms; give less"
        )
    with torch.no_grad():
        table = BlockTable(
            layers[0].sizes,
            config.latency_batch_size,
            config.latency_seq_length,
            parameter.device,
            parameter.dtype,
            engine.part,
            progress,
        )
    dense = dense_blocks(layers)
    # (by the table, measured), in milliseconds.
    points = [(0.0, 0.0), (table.total(dense), dense_ms)]
    tried: list[tuple[float, BlockPlan]] = []
    for _ in range(ROUNDS):
        try:
            plan = plan_blocks(layers, form, _table_time(points, target), table.cost)
            plan = replace(plan, embeddings=embeddings or {})
        except UserError:
            break
        if any(plan.layers == known.layers for _, known in tried):
            break
        _, share = against_dense(plan)
        measured = share * dense_ms
        tried.append((measured, plan))
        if abs(measured - target) <= TOLERANCE * target:
            return plan
        points.append((table.total(plan), measured))
    if not tried or min(tried, key=lambda item: item[0])[0] > (1 + TOLERANCE) * target:
        raise UserError(
            f"no plan was found that takes {target:.3g} ms, where the dense model takes {dense_ms:.3g} ms; give more"
        )
    measured, plan = min(tried, key=lambda item: abs(item[0] - target))
    logger.warning("the nearest plan found to %.3g ms takes %.3g ms", target, measured)
    return plan


def _table_time(points: list[tuple[float, float]], target: float) -> float:
    """The time by the table of what takes ``target``: on the line through the two points that were measured nearest to
    it.

    Measured times are not the table's and a constant: a busy machine stretches the longer calls more.
    """
    (x, y), (other_x, other_y) = sorted(points, key=lambda point: abs(point[1] - target))[:2]
    if (x - other_x) * (y - other_y) <= 0:
        return x * target / max(y, 1e-9)
    return x + (target - y) * (x - other_x) / (y - other_y)
