"""One class of several: accuracy, cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from .kind import Kind, drawn_cross_entropy, leading_first, softened_divergence


class SingleLabel(Kind):
    """Answers are logits (rows, classes), labels class numbers (rows,)."""

    name = "single_label_classification"
    problem_type: str | None = name

    def check_examples(self, model: PreTrainedModel, examples: Any) -> None:
        classes = model.config.num_labels
        if "labels" not in (getattr(examples, "column_names", None) or ()):
            return
        for index, label in enumerate(examples["labels"]):
            if label not in range(classes):
                raise UserError(
                    f"training example {index} has the label {label!r}, but the model's go from 0 to {classes - 1}; "
                    "correct the labels, or take the model that has them"
                )

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Cross-entropy against a class drawn from softmax(answers / temperature)."""
        return drawn_cross_entropy(answers, temperature, generator)

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) at a temperature, times its square (Hinton et al., 2015); mean over rows."""
        return softened_divergence(student, teacher, temperature)

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """accuracy, f1 (of class 1 for two classes, else the classes' mean) and matthews_correlation.

        Where all labels are of one class only accuracy is given, which is then that class's recall: f1 and the
        correlation need examples of another.
        """
        labels, predictions = truth["labels"], answers.argmax(-1)
        found = {"accuracy": float(accuracy_score(labels, predictions))}
        if len(np.unique(labels)) > 1:
            average = "binary" if answers.shape[-1] == 2 else "macro"
            found["f1"] = float(f1_score(labels, predictions, average=average, zero_division=0))
            found["matthews_correlation"] = float(matthews_corrcoef(labels, predictions))
        return leading_first(found, leading)


SINGLE_LABEL = SingleLabel()
