"""Metrics of a model on held-out examples, as its kind of task defines them (see ``kinds``).

In every dictionary of metrics the one that leads comes first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..kinds import REGRESSION, SINGLE_LABEL, Kind, kind_of


def metrics_of(
    logits: np.ndarray, labels: np.ndarray, leading: str | None = None
) -> dict[str, float]:
    """Metrics of one set of predictions of classes or scores.

    Args:
        logits: (examples, classes), or (examples, 1) or (examples,) for regression.
        labels: (examples,) class numbers, or floats for regression.
        leading: the metric to name first.

    Returns:
        What ``SINGLE_LABEL`` or ``REGRESSION`` gives.
    """
    kind: Kind = REGRESSION if logits.ndim == 1 or logits.shape[-1] == 1 else SINGLE_LABEL
    return kind.metrics(logits, {"labels": labels}, leading)


def main_metric(metrics: dict[str, float]) -> str:
    """The metric that reports lead with: the first."""
    return next(iter(metrics))


def predict(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    progress: bool = True,
    title: str = "predict",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A model's answers, float32, and their truth by name, of padded batches with ``labels``, on the CPU.

    Of a classifier: logits (examples, classes) and ``labels`` (examples,). See ``kinds``.
    """
    return kind_of(model).predict(model, batches, progress, title)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean KL divergence, in nats, of the student's classes (examples, classes) from the teacher's, both as logits.

    It moves with every answer, not only with those that change sides, so it tells models apart that are equally
    accurate.
    """
    return float(
        nn.functional.kl_div(
            student.double().log_softmax(-1),
            teacher.double().log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
    )


def evaluate(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    progress: bool = True,
    title: str = "evaluate",
    leading: str | None = None,
    others: dict[str, list[dict[str, torch.Tensor]]] | None = None,
) -> dict[str, float]:
    """Run ``model`` over padded batches with ``labels`` and return the metrics of its kind of task.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> ids = torch.arange(1, 33).reshape(4, 8)
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    >>> list(evaluate(model, [batch], progress=False))
    ['accuracy', 'f1', 'matthews_correlation']

    Args:
        batches: dicts with ``input_ids`` and ``attention_mask`` (batch, tokens) and ``labels`` (batch,), class numbers,
            or floats where the model has one output.
        title: of the progress bar.
        leading: the metric that comes first.
        others: further held-out splits by name; their metrics follow as ``metric_name``.
    """
    answers, truth = predict(model, batches, progress, title)
    metrics = kind_of(model).metrics(
        answers.numpy(), {name: value.numpy() for name, value in truth.items()}, leading
    )
    for name, split in (others or {}).items():
        found = evaluate(model, split, progress, f"{title}, {name}", leading)
        metrics.update({f"{metric}_{name}": value for metric, value in found.items()})
    return metrics
