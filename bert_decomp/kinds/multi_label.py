"""Any number of labels an example: binary cross-entropy, F1, a threshold for each label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.model_labels import MULTI_LABEL as NAME
from ..errors import UserError
from .kind import Kind, leading_first

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MultiLabel(Kind):
    """Answers are logits (rows, labels), labels 0.0 or 1.0 (rows, labels).

    Attributes:
        thresholds: the probability from which on each label is given; 0.5 for all if None.
    """

    thresholds: tuple[float, ...] | None = None

    name = problem_type = NAME
    recipe = 2

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        return self.has_head(config, class_name) and config.problem_type == self.name

    def bound(self, config: Any) -> MultiLabel:
        """With the thresholds in a model's config.

        Raises:
            UserError: they are no probabilities, one a label.
        """
        found = getattr(config, "thresholds", None)
        if found is None:
            return MultiLabel()
        if not (
            isinstance(found, (list, tuple))
            and len(found) == config.num_labels
            and all(isinstance(value, (int, float)) and 0 < value < 1 for value in found)
        ):
            raise UserError(
                f"the model's config has thresholds {found!r:.80}; give a number between 0 and 1 for each of its "
                f"{config.num_labels} labels, or none"
            )
        return MultiLabel(tuple(found))

    def start_(self, model: PreTrainedModel, train: Dataset) -> None:
        """The output's bias becomes the log-odds of each label (Lin et al., ICCV 2017, section 4.1): a few epochs do
        not lead from 0 down to labels that are rare, and the others suffer."""
        labels = torch.tensor(train["labels"][:])
        counts, outputs = labels.sum(0), labels.shape[1]
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        *_, last = (linear for linear in linears if linear.out_features == outputs)
        if last.bias is not None:
            with torch.no_grad():
                last.bias.copy_(((counts + 1) / (len(labels) + 2)).logit())

    def settle_(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> None:
        """Write into the model's config, for each label, the threshold of the best F1 on labelled ``batches``."""
        logits, truth = self.predict(model, batches, title="thresholds")
        columns = zip(logits.sigmoid().numpy().T, truth["labels"].numpy().T, strict=True)
        model.config.thresholds = [best_threshold(scores, labels) for scores, labels in columns]

    def decisions(self, answers: Tensor) -> Tensor:
        return answers > self._cuts(answers.shape[-1])

    def _cuts(self, labels: int) -> Tensor:
        """The thresholds as logits (labels,)."""
        return torch.tensor(self.thresholds or [0.5] * labels, dtype=torch.float64).logit().float()

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Binary cross-entropy against labels drawn from sigmoid(answers / temperature)."""
        scaled = answers / temperature
        drawn = torch.bernoulli(scaled.detach().sigmoid().cpu(), generator=generator)
        return F.binary_cross_entropy_with_logits(scaled, drawn.to(scaled.device), reduction="sum")

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) of each label at a temperature, times its square; sum over labels, mean over rows."""
        student, teacher = student / temperature, teacher / temperature
        divergence = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student)) + (
            -teacher
        ).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return divergence.sum() / len(teacher) * temperature**2

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """f1_micro, f1_macro and average_precision (mean over labels), the means over labels that occur."""
        labels = truth["labels"].astype(bool)
        given = self.decisions(torch.from_numpy(answers)).numpy()
        present = labels.any(0)
        found = {
            "f1_micro": float(f1_score(labels, given, average="micro", zero_division=0)),
            "f1_macro": 0.0,
            "average_precision": 0.0,
        }
        if present.any():
            pairs = [(labels[:, i], given[:, i], answers[:, i]) for i in np.flatnonzero(present)]
            found["f1_macro"] = float(
                np.mean([f1_score(a, b, zero_division=0) for a, b, _ in pairs])
            )
            found["average_precision"] = float(
                np.mean([average_precision_score(a, c) for a, _, c in pairs])
            )
        return leading_first(found, leading)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold in (0, 1) of the best F1: midway between two scores, the one nearest to 0.5 of equally good ones.

    Args:
        scores: probabilities (rows,).
        labels: 0.0 or 1.0 (rows,). If all are alike the threshold is 0.5.

    >>> best_threshold(np.array([0.1, 0.3, 0.7]), np.array([0.0, 1.0, 1.0]))
    0.2
    """
    if len(np.unique(labels)) < 2:
        return 0.5
    precision, recall, cuts = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    # At the cut i all scores from cuts[i] on are positive: any threshold above cuts[i - 1] does the same.
    best = np.flatnonzero(f1[:-1] >= f1[:-1].max() - 1e-12)
    middles = [(float(cuts[i - 1] if i else 0.0) + float(cuts[i])) / 2 for i in best]
    chosen = min(middles, key=lambda value: abs(value - 0.5))
    return min(max(round(chosen, 6), 1e-6), 1 - 1e-6) if math.isfinite(chosen) else 0.5


MULTI_LABEL = MultiLabel()
