"""A score: correlations, squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from .kind import Kind, leading_first, random_signs


class Regression(Kind):
    """Answers are (rows, 1), labels scores (rows,)."""

    name = "regression"
    problem_type: str | None = name

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        return self.has_head(config, class_name) and config.num_labels == 1

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """The answers times random signs."""
        return (answers * random_signs(answers, generator)).sum()

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared difference; the temperature has no meaning here."""
        return F.mse_loss(student, teacher)

    def decisions(self, answers: Tensor) -> Tensor | None:
        return None

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """spearmanr and pearson; a correlation with a constant is 0."""
        labels = truth["labels"]
        values = answers.reshape(len(labels))
        constant = np.ptp(values) == 0 or np.ptp(labels) == 0
        return leading_first(
            {
                "spearmanr": 0.0 if constant else float(spearmanr(values, labels).statistic),
                "pearson": 0.0 if constant else float(pearsonr(values, labels).statistic),
            },
            leading,
        )


REGRESSION = Regression()
