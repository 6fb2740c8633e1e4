"""Metrics of a classifier on a task: scikit-learn's and scipy's, chosen by the kind of label.

In every dictionary of metrics the one that leads comes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from tqdm.auto import tqdm


def metrics_of(
    logits: np.ndarray, labels: np.ndarray, leading: str | None = None
) -> dict[str, float]:
    """Metrics of one set of predictions.

    Args:
        logits: (examples, classes), or (examples, 1) or (examples,) for regression.
        labels: (examples,) class numbers, or floats for regression.
        leading: the metric to name first.

    Returns:
        accuracy, f1 (of class 1 for two classes, else the classes' mean) and matthews_correlation; or spearmanr and
        pearson. Shares of 1, not percent. A correlation with a constant is 0. Where all labels are of one class only
        accuracy is given, which is then that class's recall: f1 and the correlation need examples of another.
    """
    if logits.ndim == 1 or logits.shape[-1] == 1:
        values = logits.reshape(len(labels))
        constant = np.ptp(values) == 0 or np.ptp(labels) == 0
        found = {
            "spearmanr": 0.0 if constant else float(spearmanr(values, labels).statistic),
            "pearson": 0.0 if constant else float(pearsonr(values, labels).statistic),
        }
    else:
        predictions = logits.argmax(-1)
        average = "binary" if logits.shape[-1] == 2 else "macro"
        found = {
            "accuracy": float(accuracy_score(labels, predictions)),
            "f1": float(f1_score(labels, predictions, average=average, zero_division=0)),
            "matthews_correlation": float(matthews_corrcoef(labels, predictions)),
        }
        if len(np.unique(labels)) < 2:
            found = {"accuracy": found["accuracy"]}
    return {leading: found[leading], **found} if leading in found else found


def main_metric(metrics: dict[str, float]) -> str:
    """The metric that reports lead with: the first."""
    return next(iter(metrics))


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    progress: bool = True,
    title: str = "predict",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (examples, classes), float32, and labels (examples,) of padded batches with ``labels``, on the CPU."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits, labels = [], []
    for batch in tqdm(batches, desc=title, unit="batch", disable=not progress, leave=False):
        inputs: dict[str, Any] = {
            name: value.to(device) for name, value in batch.items() if name != "labels"
        }
        logits.append(model(**inputs).logits.float().cpu())
        labels.append(batch["labels"])
    model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


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
    """Run ``model`` over padded batches with ``labels`` and return its metrics (see ``metrics_of``).

    Args:
        others: further held-out splits by name; their metrics follow as ``metric_name``.
    """
    logits, labels = predict(model, batches, progress, title)
    metrics = metrics_of(logits.numpy(), labels.numpy(), leading)
    for name, split in (others or {}).items():
        found = evaluate(model, split, progress, f"{title}, {name}", leading)
        metrics.update({f"{metric}_{name}": value for metric, value in found.items()})
    return metrics
