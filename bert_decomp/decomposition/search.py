"""Plans for which the model itself is run: the largest within a latency, the smallest within a drop of the metric."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..config import DecompositionConfig
from ..engines import TORCH, Engine, find_engine
from ..errors import UserError
from ..evaluation.latency import median_ratio, random_inputs, take_turns
from ..evaluation.metrics import evaluate, main_metric
from ..models.embedding import LowRankEmbedding
from ..planning import (
    MatrixPlan,
    OperatorTable,
    RankPlan,
    RankProblem,
    for_latency,
    for_max_drop,
    log_dense_layers,
    read_rank_plan,
)
from ..statistics import Statistics
from .apply import apply_plan_

# Added to the smallest share of the weights, so that rounding does not put a search below it.
MARGIN = 1e-6


def random_twin(model: PreTrainedModel, plan: RankPlan) -> PreTrainedModel:
    """A copy of ``model`` with random factors where ``plan`` cuts: it takes as long as the student would."""
    twin = copy.deepcopy(model).eval()
    _put_random_(twin, plan.matrices, LowRankLinear)
    return with_random_embeddings(twin, plan.embeddings)


def with_random_embeddings(
    twin: PreTrainedModel, embeddings: dict[str, MatrixPlan]
) -> PreTrainedModel:
    """``twin``, changed in place, with random factors in the place of a word embedding that is cut."""
    _put_random_(twin, embeddings, LowRankEmbedding)
    return twin


def _put_random_(
    twin: PreTrainedModel,
    entries: dict[str, MatrixPlan],
    kind: type[LowRankLinear] | type[LowRankEmbedding],
) -> None:
    for name, entry in entries.items():
        if entry.rank is not None:
            weight = twin.get_submodule(name).weight
            layer = kind(
                entry.in_features,
                entry.out_features,
                entry.rank,
                device=weight.device,
                dtype=weight.dtype,
            )
            twin.set_submodule(name, layer.eval())


def plan_for_latency(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    *,
    weights: dict[str, float] | None = None,
    engine: Engine = TORCH,
    seconds: float = 2.0,
    dense_ms: float | None = None,
) -> RankPlan:
    """The largest plan with which ``model`` takes ``config.latency_ms``, measured on this machine.

    Args:
        config: its latency is that of one batch of ``latency_batch_size`` inputs of ``latency_seq_length`` tokens.
        weights: for the allocation ``sensitivity``.
        engine: what runs the model.
        seconds: for each of two models at each measurement.
        dense_ms: what the dense model takes, where that is known; measured otherwise. With it the plan is sought by its
            share of that time, whatever speed the machine has by now.

    Raises:
        UserError: the dense model is fast enough, or nothing is.
    """
    if config.latency_ms is None:
        raise UserError("latency_ms is not given")
    problem = RankProblem.of(model, config)
    parameter = next(model.parameters())
    inputs = random_inputs(model, config.latency_batch_size, config.latency_seq_length)
    dense_seconds: list[float] = []
    model.eval()
    with torch.no_grad():
        dense_call = engine.model(model, inputs)

    @torch.inference_mode()
    def latency(plan: RankPlan | None) -> float:
        """Neighbouring calls of the dense model and the plan's share what the machine does to both: the median of their
        ratios holds though its speed drifts, and times what the dense model takes it is a time."""
        if plan is None and dense_ms is not None:
            return dense_ms / 1e3
        calls = {"dense": dense_call}
        if plan is not None:
            with torch.inference_mode(False), torch.no_grad():
                calls["plan"] = engine.model(random_twin(model, plan), inputs)
        times = take_turns(calls, seconds, cuda=parameter.is_cuda)
        dense_seconds.extend(times["dense"])
        usual = float(np.median(dense_seconds)) if dense_ms is None else dense_ms / 1e3
        return usual if plan is None else usual * median_ratio(times["plan"], times["dense"])

    rows = config.latency_batch_size * config.latency_seq_length
    return for_latency(
        config.latency_ms / 1e3,
        problem.shapes,
        problem.allocate(statistics, weights),
        problem.least_fraction + MARGIN,
        OperatorTable(rows, parameter.device, parameter.dtype, prepare=engine.part),
        latency,
    )


def plan_for_max_drop(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    batches: list[dict[str, Tensor]],
    *,
    weights: dict[str, float] | None = None,
) -> RankPlan:
    """The smallest plan with which the main metric on ``batches`` is at most ``config.max_drop`` points (of 100) below
    the dense model's, before any training.

    Args:
        batches: padded and labelled, held out.
        weights: for the allocation ``sensitivity``.

    Raises:
        UserError: not even the largest plan is good enough.
    """
    if config.max_drop is None:
        raise UserError("max_drop is not given")
    problem = RankProblem.of(model, config)
    # Ranks are searched for without anchoring, which runs the calibration set once more at every step.
    unanchored = replace(config, anchored=False)

    @torch.inference_mode()
    def metric(form: nn.Module) -> float:
        values = evaluate(form, batches, progress=False)
        return values[main_metric(values)]

    def metric_of_plan(plan: RankPlan) -> float:
        student = copy.deepcopy(model).eval()
        apply_plan_(student, plan, unanchored, statistics, progress=False)
        return metric(student)

    return for_max_drop(
        config.max_drop / 100,
        metric(model),
        problem.allocate(statistics, weights),
        problem.least_fraction + MARGIN,
        metric_of_plan,
    )


def plan_for_config(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    held_out: list[dict[str, Tensor]] | None = None,
    *,
    weights: dict[str, float] | None = None,
    fused: bool = False,
) -> RankPlan:
    """The plan that ``config`` asks for, whatever way it sets the size; each matrix left dense is logged in one line.

    Args:
        held_out: padded and labelled batches, for ``config.max_drop``.
        weights: for the allocation ``sensitivity``.
        fused: a latency is that of the inference form.

    Raises:
        UserError: the size cannot be met, or the plan file is not one.
    """
    if config.plan_file is not None:
        return read_rank_plan(config.plan_file)
    if config.latency_ms is not None:
        engine = find_engine(config.engine_for(fused), next(model.parameters()).device)
        plan = plan_for_latency(model, config, statistics, weights=weights, engine=engine)
    elif config.max_drop is not None:
        if not held_out or not all("labels" in batch for batch in held_out):
            raise UserError("max_drop needs labelled batches to measure it on; give held_out")
        plan = plan_for_max_drop(model, config, statistics, held_out, weights=weights)
    else:
        plan = RankProblem.of(model, config).plan(statistics, weights)
    log_dense_layers(plan, config)
    return plan
