"""Quality against latency over sizes: one model decomposed to several shares of its encoder, evaluated and timed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..config import DecompositionConfig
from ..decomposition.decompose import decompose_
from ..evaluation.latency import measure
from ..evaluation.metrics import evaluate, main_metric
from ..runtime import fuse_
from ..statistics import Statistics


def pareto(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    fractions: list[float],
    batches: list[dict[str, Tensor]],
    *,
    batch_size: int,
    length: int,
    seconds: float,
    threads: int,
    leading: str | None = None,
    calibration: list[dict[str, Tensor]] | None = None,
    fused: bool = True,
) -> dict[str, Any]:
    """Metric and latency of ``teacher``, ``student``, and the teacher decomposed to each fraction, before training.

    Variants are timed in alternation, so drift affects all equally.

    Args:
        student: the distilled model, in the form that is to be timed.
        config: the method and allocation; its size is replaced by each of ``fractions``.
        statistics: what the method needs.
        fractions: of the encoder's weights.
        batches: held-out examples with labels.
        batch_size, length, seconds, threads: how they are timed, see ``measure``.
        leading: the metric to report, if not the first.
        calibration: the batches that the statistics are of, for anchored factors.
        fused: evaluate and time the decomposed models in their inference form.

    Returns:
        A plain dict: ``metric``'s name, ``batch_size``, and ``points`` and ``references`` (teacher, distilled), each of
        ``label``, ``metric`` and ``latency_ms``.
    """
    models = {"teacher": teacher, "distilled": student}
    for fraction in fractions:
        smaller = copy.deepcopy(teacher)
        decompose_(
            smaller,
            config.sized(fraction),
            calibration,
            statistics=statistics,
            progress=False,
        )
        models[f"{100 * fraction:g} %"] = fuse_(smaller) if fused else smaller.eval()
    metrics = {
        label: evaluate(model, batches, title=label, leading=leading)
        for label, model in models.items()
    }
    name = main_metric(metrics["teacher"])
    rows = measure(
        {label: (model, None) for label, model in models.items()},
        [batch_size],
        length,
        seconds=seconds,
        threads=threads,
    )["rows"]
    points = [
        {
            "label": row["form"],
            "metric": metrics[row["form"]][name],
            "latency_ms": row["latency_ms"],
        }
        for row in rows
    ]
    return {
        "metric": name,
        "batch_size": batch_size,
        "references": points[:2],
        "points": points[2:],
    }
