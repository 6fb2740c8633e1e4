"""Quality against latency over sizes: the same model decomposed to several shares of its encoder, evaluated and timed."""

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
    shares: list[float],
    batches: list[dict[str, Tensor]],
    *,
    batch_size: int,
    length: int,
    seconds: float,
    threads: int,
    leading: str | None = None,
    calibration: list[dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Metric and latency of ``teacher``, of ``student``, and of the teacher decomposed to each share, before training.

    Every low-rank model is timed in its inference form; all take turns in one process.

    Args:
        config: the method and allocation; its size is replaced by each of ``shares``.
        statistics: what the method needs.
        shares: of the encoder's weights.
        batches: held-out examples with labels.
        batch_size, length, seconds, threads: how they are timed, see ``measure``.
        leading: the metric to report, if not the first.
        calibration: the batches that the statistics are of, for anchored factors.

    Returns:
        A plain dict: ``metric``'s name, ``batch_size``, and ``points`` and ``references`` (teacher, distilled), each of
        ``label``, ``metric`` and ``latency_ms``.
    """
    models = {"teacher": teacher, "distilled": fuse_(copy.deepcopy(student))}
    for share in shares:
        smaller = copy.deepcopy(teacher)
        decompose_(
            smaller, config.sized(share), statistics=statistics, progress=False, batches=calibration
        )
        models[f"{100 * share:g} %"] = fuse_(smaller)
    found = {
        label: evaluate(model, batches, title=label, leading=leading)
        for label, model in models.items()
    }
    name = main_metric(found["teacher"])
    rows = measure(
        {label: (model, None) for label, model in models.items()},
        [batch_size],
        length,
        seconds=seconds,
        threads=threads,
    )["rows"]
    points = [
        {"label": row["form"], "metric": found[row["form"]][name], "latency_ms": row["latency_ms"]}
        for row in rows
    ]
    return {
        "metric": name,
        "batch_size": batch_size,
        "references": points[:2],
        "points": points[2:],
    }
