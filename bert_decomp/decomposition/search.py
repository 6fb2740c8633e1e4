"""Rank plans from what a user wants: a latency or a quality, for which the model itself is run, or ranks of their own."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear

from ..config import DecompositionConfig
from ..evaluation.latency import median_ratio, random_inputs, take_turns
from ..evaluation.metrics import evaluate, main_metric
from ..models.selection import select_linears
from ..planning import OperatorTable, RankPlan, for_latency, for_quality, read_plan, shapes_of
from ..runtime import fuse_
from ..statistics import Statistics
from .decompose import decompose_, least_fraction, plan_ranks, say_dense
from .embedding import LowRankEmbedding


class _Goal:
    """Plans by share of the weights, and students made with them."""

    def __init__(
        self,
        model: nn.Module,
        config: DecompositionConfig,
        statistics: Statistics | None,
        weights: dict[str, float] | None,
    ):
        self.model, self.config, self.statistics, self.weights = model, config, statistics, weights
        self.shapes = shapes_of(select_linears(model, config.include, config.exclude))
        self.smallest = least_fraction(model, self.shapes, config) + 1e-6

    def plan(self, fraction: float) -> RankPlan:
        return plan_ranks(
            self.model, self.config.sized(fraction), self.statistics, self.weights, say=False
        )

    def student(self, plan: RankPlan) -> nn.Module:
        student = copy.deepcopy(self.model).eval()
        # Ranks are searched for without anchoring, which runs the calibration set once more at every step.
        decompose_(
            student, replace(self.config, anchored=False), self.statistics, plan, progress=False
        )
        return student

    def stand_in(self, plan: RankPlan) -> nn.Module:
        """A model of the same shapes as the student with random factors, which takes as long."""
        model = copy.deepcopy(self.model).eval()
        for kind, entries in ((LowRankLinear, plan.matrices), (LowRankEmbedding, plan.embeddings)):
            for name, entry in entries.items():
                if entry.rank is not None:
                    weight = model.get_submodule(name).weight
                    model.set_submodule(
                        name,
                        kind(
                            entry.in_features,
                            entry.out_features,
                            entry.rank,
                            device=weight.device,
                            dtype=weight.dtype,
                        ).eval(),
                    )
        return model


def plan_for_latency(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None,
    milliseconds: float,
    *,
    batch_size: int = 1,
    length: int = 128,
    weights: dict[str, float] | None = None,
    fused: bool = False,
    seconds: float = 2.0,
    dense_milliseconds: float | None = None,
) -> RankPlan:
    """The largest plan with which ``model`` takes ``milliseconds``, measured on this machine at this batch and length.

    Args:
        config: method, allocation, patterns, multiple; its size is ignored.
        weights: for the allocation ``sensitivity``.
        fused: measure the inference form (see ``runtime``).
        seconds: for each of two models at each measurement.
        dense_milliseconds: what the dense model takes, where that is known; measured otherwise. With it the plan is sought by
            its share of that time, whatever speed the machine has by now.

    Raises:
        UserError: the dense model is fast enough, or nothing is.
    """
    goal = _Goal(model, config, statistics, weights)
    inputs, cuda, dense = (
        random_inputs(model, batch_size, length),
        next(model.parameters()).is_cuda,
        [],
    )
    model.eval()

    @torch.inference_mode()
    def latency(plan: RankPlan | None) -> float:
        """Neighbouring calls of the dense model and the plan's share what the machine does to both: the median of their
        ratios holds though its speed drifts, and times what the dense model takes it is a time."""
        if plan is None and dense_milliseconds is not None:
            return dense_milliseconds / 1e3
        forms = {"dense": model}
        if plan is not None:
            forms["plan"] = fuse_(goal.stand_in(plan)) if fused else goal.stand_in(plan)
        times = take_turns(
            {name: partial(form, **inputs) for name, form in forms.items()}, seconds, cuda=cuda
        )
        dense.extend(times["dense"])
        usual = float(np.median(dense)) if dense_milliseconds is None else dense_milliseconds / 1e3
        return usual if plan is None else usual * median_ratio(times["plan"], times["dense"])

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return for_latency(
        milliseconds / 1e3,
        goal.shapes,
        goal.plan,
        goal.smallest,
        OperatorTable(batch_size * length, device, dtype),
        latency,
    )


def plan_for_quality(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None,
    points: float,
    batches: list[dict[str, Tensor]],
    *,
    weights: dict[str, float] | None = None,
) -> RankPlan:
    """The smallest plan with which the main metric on ``batches`` is at most ``points`` (of 100) below the dense model's,
    before any training.

    Raises:
        UserError: not even the largest plan is good enough.
    """
    goal = _Goal(model, config, statistics, weights)

    @torch.inference_mode()
    def metric(form: nn.Module) -> float:
        values = evaluate(form, batches, progress=False)
        return values[main_metric(values)]

    return for_quality(
        points / 100,
        metric(model),
        goal.plan,
        goal.smallest,
        lambda plan: metric(goal.student(plan)),
    )


def plan_for_goal(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None,
    batches: list[dict[str, Tensor]],
    *,
    weights: dict[str, float] | None = None,
    fused: bool = False,
) -> RankPlan:
    """The plan that ``config`` asks for, whatever way it sets the size.

    Args:
        batches: labelled examples, for a quality.
        weights: for the allocation ``sensitivity``.
        fused: a latency is that of the inference form.

    Raises:
        UserError: it cannot be met, or the plan file is not one.
    """
    if config.plan_file is not None:
        return read_plan(config.plan_file)
    if config.latency_ms is None and config.max_drop is None:
        return plan_ranks(model, config, statistics, weights)
    plan = (
        plan_for_quality(model, config, statistics, config.max_drop, batches, weights=weights)
        if config.latency_ms is None
        else plan_for_latency(
            model,
            config,
            statistics,
            config.latency_ms,
            batch_size=config.latency_batch_size,
            length=config.latency_seq_length,
            weights=weights,
            fused=fused,
        )
    )
    say_dense(plan, config)
    return plan
