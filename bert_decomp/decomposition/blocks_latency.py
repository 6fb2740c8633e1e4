"""The plan of heads and neurons that meets a latency, measured on this machine."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..config import DecompositionConfig
from ..engines import Engine
from ..errors import UserError
from ..evaluation.latency import median_ratio, random_inputs, take_turns
from ..models.architectures import encoder_layers
from ..models.resized import Constant, Removed, ResizedLinear
from ..planning import MatrixPlan
from ..planning.blocks import BlockPlan, LayerPlan, Sizes
from ..planning.costs import BlockTable
from ..units import Form, Layer, family_of
from .search import with_random_embeddings
from .structure import dense_blocks, install_, plan_blocks

logger = logging.getLogger("bert_decomp")

# A measured latency this near to the target is taken, and how many plans are measured for it at most.
TOLERANCE, ROUNDS = 0.05, 6


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
