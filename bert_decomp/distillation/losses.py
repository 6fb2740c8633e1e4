"""The terms of the distillation loss: what each compares, how much it counts, and the presets.

Student and teacher have the same shape everywhere (Ben Noach and Goldberg, AACL 2020, section 3.2), so features are
compared directly, without projections:

    loss = sum over terms of weight(progress) * mean over layers of  |f_student - f_teacher|^2 / Var(f_teacher)

The mean runs over real tokens only, and the division by the teacher feature's own variance puts all terms on one scale.
``attention_probabilities`` is a KL divergence instead. ``logits`` compares the models' answers and ``task`` is the loss
against the labels, both as the kind of task defines them: for classes the temperature-scaled divergence of Hinton et
al. (2015) and cross-entropy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..errors import UserError
from .terms import FEATURE_TERMS, WITHOUT_COUNTERPART

# How the layers share a term: the weight of layer i of n. They are brought to sum 1, so a term's scale stays.
LAYER_WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda i, n: 1.0,
    "linear": lambda i, n: i + 1.0,
    "last": lambda i, n: float(i == n - 1),
}

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"\s*(\w+)\s*=\s*({_NUMBER})(?:\.\.({_NUMBER}))?(?:@(\w+))?\s*")


@dataclass(frozen=True)
class Weight:
    """How much a term counts: from ``start`` in a straight line to ``end`` at the last, shared among ``layers``."""

    start: float
    end: float | None = None
    layers: str = "uniform"

    def __post_init__(self) -> None:
        if any(
            not math.isfinite(value) or value < 0
            for value in (self.start, self.start if self.end is None else self.end)
        ):
            raise UserError(f"distillation weights must be finite and not negative: {self}")
        if self.layers not in LAYER_WEIGHTS:
            raise UserError(
                f"unknown layer weights {self.layers!r}; choose from {', '.join(LAYER_WEIGHTS)}"
            )

    @property
    def is_zero(self) -> bool:
        return not self.start and not self.end

    def at(self, progress: float) -> float:
        """The weight after that share of the training, 0 to 1."""
        return self.start if self.end is None else self.start + (self.end - self.start) * progress

    def of_layers(self, count: int) -> dict[int, float]:
        """The share of each layer that has one."""
        weights = {i: LAYER_WEIGHTS[self.layers](i, count) for i in range(count)}
        return {i: weight / sum(weights.values()) for i, weight in weights.items() if weight}

    def __str__(self) -> str:
        return (
            f"{self.start:g}"
            + ("" if self.end is None else f"..{self.end:g}")
            + ("" if self.layers == "uniform" else f"@{self.layers}")
        )


def parse_terms(text: str) -> dict[str, Weight]:
    """Read ``name=weight``, ``name=start..end`` or either with ``@layers``, separated by commas.

    >>> {name: str(weight) for name, weight in parse_terms("hidden=1@linear, logits=0.5..1").items()}
    {'hidden': '1@linear', 'logits': '0.5..1'}

    Raises:
        UserError: a part is written in another way.
    """
    terms = {}
    for part in text.split(","):
        found = _TERM.fullmatch(part)
        if found is None:
            raise UserError(
                f"{part.strip()!r} in {text!r} is not name=weight, name=start..end or name=weight@layers "
                "(such as hidden=1@linear,logits=0.5..1)"
            )
        name, start, end, layers = found.groups()
        terms[name] = Weight(float(start), None if end is None else float(end), layers or "uniform")
    return terms


TERMS = (*FEATURE_TERMS, "logits", "task")


@dataclass
class DistillationConfig:
    """Terms by name and weight, the temperature of the logits term, and whether the student keeps its dropout.

    Without dropout the student is compared with its teacher as both will be used; its noise would be most of the loss
    of a student that starts close to the teacher. The terms are those of Ben Noach and Goldberg (AACL 2020, section
    3.2) and further ones, all in ``FEATURE_TERMS``; each is a mean square over the teacher's variance, without a unit.

    >>> config = DistillationConfig({"hidden": 1.0, "logits": 0.5}, temperature=2.0)
    >>> sorted(config.weights), config.features
    (['hidden', 'logits'], {'hidden'})

    Args:
        terms: a plain number stands for a weight that stays and is the same for every layer. As ``weights`` they are
            all of the class ``Weight``, without those that are zero.

    Raises:
        UserError: an unknown term, a negative weight, no term at all, or a temperature that is not positive.
    """

    terms: Mapping[str, Weight | float] = field(
        default_factory=lambda: dict(PRESETS["paper"].terms)
    )
    temperature: float = 1.0
    dropout: bool = False
    weights: dict[str, Weight] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.terms) - set(TERMS))
        if unknown:
            raise UserError(
                f"unknown distillation term {unknown[0]!r}; choose from {', '.join(TERMS)}"
            )
        weights = {
            name: weight if isinstance(weight, Weight) else Weight(weight)
            for name, weight in self.terms.items()
        }
        self.weights = {name: weight for name, weight in weights.items() if not weight.is_zero}
        self.terms = self.weights
        if not self.terms:
            raise UserError("no distillation term has a weight above zero; give at least one")
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}; give a number above zero")

    @property
    def features(self) -> set[str]:
        """What must be recorded of student and teacher."""
        return {FEATURE_TERMS[name].feature for name in self.terms if name in FEATURE_TERMS}

    @property
    def needs_teacher(self) -> bool:
        return set(self.terms) != {"task"}

    def without_labels(self) -> DistillationConfig:
        """The same without the term that needs labelled examples.

        >>> "task" in DistillationConfig().without_labels().terms
        False
        """
        return self._without({"task"})

    @property
    def terms_without_counterpart(self) -> list[str]:
        """The terms that need student and teacher to have the same heads.

        >>> DistillationConfig({"value": 1.0, "attention_scores": 1.0}).terms_without_counterpart
        ['attention_scores']
        """
        return [name for name in self.terms if name in WITHOUT_COUNTERPART]

    def of_counterparts(self) -> DistillationConfig:
        """The same for a student with fewer or smaller heads or fewer neurons.

        >>> set(PRESETS["paper"].terms) - set(PRESETS["paper"].of_counterparts().terms)
        {'attention_scores'}
        """
        return self._without(WITHOUT_COUNTERPART)

    def _without(self, names: set[str]) -> DistillationConfig:
        terms = {name: weight for name, weight in self.terms.items() if name not in names}
        return replace(self, terms=terms)


PRESETS: dict[str, DistillationConfig] = {
    # Every feature the paper lists, equally weighted, and its two losses on the output.
    "paper": DistillationConfig(
        dict.fromkeys(
            (
                "query",
                "key",
                "value",
                "attention_scores",
                "context",
                "attention_output",
                "ffn_intermediate",
                "ffn_output",
                "hidden",
                "logits",
                "task",
            ),
            1.0,
        )
    ),
    # What any architecture offers, and little more than the cost of two forward passes.
    "light": DistillationConfig({"hidden": 1.0, "logits": 1.0, "task": 1.0}),
    # What a layer hands on, where it looks, and the teacher's answers rather than the labels.
    "best": DistillationConfig(
        {
            "hidden": 1.0,
            "value": 0.5,
            "context": 0.5,
            "attention_probabilities": 1.0,
            "ffn_output": 0.5,
            "logits": 2.0,
            "task": 0.1,
        },
        temperature=2.0,
    ),
}
