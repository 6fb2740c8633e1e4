"""``ModelLabels``: what a classifier's config says of its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError

REGRESSION, CLASSIFICATION = "regression", "single_label_classification"
MULTI_LABEL = "multi_label_classification"
PROBLEM_TYPES = (REGRESSION, CLASSIFICATION, MULTI_LABEL)


@dataclass(frozen=True)
class ModelLabels:
    """What a classifier's config says of its labels.

    Attributes:
        count: outputs of the model; one output is a score.
        names: names of the classes in order; None if the model has transformers' placeholders, ``LABEL_0`` ...
        several: whether an example has any number of them.

    Example:
        >>> ModelLabels.named("negative", "positive").count
        2
    """

    count: int
    names: tuple[str, ...] | None
    several: bool = False

    @classmethod
    def named(cls, *names: str, several: bool = False) -> ModelLabels:
        """A classifier with classes of these names."""
        return cls(len(names), names, several)

    @classmethod
    def of(cls, config: Any, where: str) -> ModelLabels:
        """The labels of a transformers config.

        Args:
            where: the model, for messages.

        Raises:
            UserError: it is a regression with several outputs, or its names are unusable.
        """
        count, problem = config.num_labels, getattr(config, "problem_type", None)
        if problem == REGRESSION and count > 1:
            raise UserError(
                f"{where} predicts {count} scores at once, which is not supported; give a model with one output"
            )
        names = [config.id2label.get(index) for index in range(count)]
        wrong = next((name for name in names if not isinstance(name, str)), None)
        if any(not isinstance(name, str) for name in names):
            raise UserError(
                f"{where} calls a class {wrong!r} in id2label, which is no text; write it in quotes in config.json"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(
                f"{where} calls two classes {twice!r} in id2label; give each class its own name in config.json"
            )
        placeholder = all(name == f"LABEL_{index}" for index, name in enumerate(names))
        return cls(count, None if placeholder else tuple(map(str, names)), problem == MULTI_LABEL)

    @property
    def is_score(self) -> bool:
        """Whether the model's one output is a score."""
        return self.count == 1 and not self.several

    @property
    def problem_type(self) -> str:
        """transformers' word for what the model was trained for."""
        return MULTI_LABEL if self.several else REGRESSION if self.is_score else CLASSIFICATION

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, their indices where they have none; None for a score."""
        return None if self.is_score else self.names or tuple(map(str, range(self.count)))
