"""What a saved model says of a text: a class, labels, a score, a vector, entities, or an answer to a question; by its
config and pooling files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.demo import resolve_model
from ..errors import UserError
from ..kinds import MULTI_LABEL, Kind, kind_of_config
from ..kinds.multi_label import MultiLabel
from ..kinds.pooling import Pooling, read_pooling
from ..kinds.question_answering import QuestionAnswering
from ..kinds.regression import Regression
from ..kinds.single_label import SingleLabel
from ..kinds.token_classification import TokenClassification
from ..models.folders import load_config

if TYPE_CHECKING:
    import pyarrow as pa

# A label of several is said of a text from this probability on, unless the config has thresholds.
THRESHOLD = 0.5


@dataclass(frozen=True)
class Answers:
    """What a model gives for a text.

    Attributes:
        kind: a key of ``KINDS``.
        width: numbers a text, or a token if ``windowed``.
        names: of the classes or labels, in order.
        pooling: for vectors.
        thresholds: the probability from which on each of several labels is given; ``THRESHOLD`` for all if None.
        windowed: of answers that are places in texts, what finds them.
    """

    kind: str
    width: int
    names: tuple[str, ...] = ()
    pooling: Pooling | None = None
    thresholds: tuple[float, ...] | None = None
    windowed: Kind | None = None

    def of_words(self) -> Answers:
        """The answers to texts that are split into words: a tag a word."""
        return replace(self, kind="tags") if self.kind == "entities" else self

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """The model's outputs (texts, width) as probabilities; scores and vectors as they are."""
        if self.kind == "class":
            shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
            return shifted / shifted.sum(-1, keepdims=True)
        return 1 / (1 + np.exp(-outputs)) if self.kind == "labels" else outputs

    def columns(self, outputs: np.ndarray) -> dict[str, pa.Array]:
        """Outputs (texts, width) as columns (pyarrow) by name."""
        return KINDS[self.kind](self, self.probabilities(outputs))

    def columns_of_rows(self, rows: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
        """What ``windowed`` found, a dict for each text, as columns (pyarrow) by name."""
        import pyarrow as pa

        fields = FIELDS[self.kind]()
        return {name: pa.array([row[name] for row in rows], kind) for name, kind in fields.items()}

    def column_names(self) -> list[str]:
        """The names of ``columns``, or of ``columns_of_rows``."""
        if self.windowed is not None:
            return list(self.columns_of_rows([]))
        return list(self.columns(np.zeros((0, self.width), np.float32)))


def _list(values: np.ndarray) -> pa.Array:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _text(values: list[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _class(answers: Answers, values: np.ndarray) -> dict[str, pa.Array]:
    import pyarrow as pa

    best = values.argmax(-1)
    return {
        "label": _text([answers.names[index] for index in best]),
        "score": pa.array(np.take_along_axis(values, best[:, None], -1)[:, 0].astype(np.float32)),
        "scores": _list(values),
    }


def _labels(answers: Answers, values: np.ndarray) -> dict[str, pa.Array]:
    import pyarrow as pa

    given = values >= np.array(answers.thresholds or [THRESHOLD] * answers.width, np.float32)
    chosen = [[answers.names[index] for index in np.flatnonzero(row)] for row in given]
    return {"labels": pa.array(chosen, pa.list_(pa.string())), "scores": _list(values)}


def _score(_answers: Answers, values: np.ndarray) -> dict[str, pa.Array]:
    import pyarrow as pa

    return {"score": pa.array(values[:, 0].astype(np.float32))}


# Kind -> columns of a text's answer: one class and its probability; every label of a probability above the threshold; a
# number or several; a vector.
KINDS: dict[str, Callable[[Answers, np.ndarray], dict[str, Any]]] = {
    "class": _class,
    "labels": _labels,
    "score": _score,
    "scores": lambda _answers, values: {"scores": _list(values)},
    "vector": lambda _answers, values: {"embedding": _list(values)},
}


def _entities() -> dict[str, pa.DataType]:
    import pyarrow as pa

    of_one = {"label": pa.string(), "text": pa.string(), "start": pa.int64(), "end": pa.int64()}
    return {"entities": pa.list_(pa.struct({**of_one, "score": pa.float32()}))}


def _tags() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {"tags": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}


def _answer() -> dict[str, pa.DataType]:
    import pyarrow as pa

    places = {"start": pa.int64(), "end": pa.int64()}
    return {"answer": pa.string(), **places, "score": pa.float32()}


# Kind of answers that are places in texts -> types (pyarrow) of what ``Kind.found`` gives: entities with their places;
# a tag and its probability a word; the answer to a question and its place.
FIELDS: dict[str, Callable[[], dict[str, Any]]] = {
    "entities": _entities,
    "tags": _tags,
    "answer": _answer,
}


def answers_of(folder: str, may_be_absent: bool = False) -> Answers:
    """What the model in a folder gives, by its config and pooling files.

    Args:
        may_be_absent: whether a question may have no answer also where the config does not say so.

    Raises:
        UserError: the folder holds no model, or one whose answers are of no known kind.
    """
    config = load_config(folder)
    kind = kind_of_config(config)
    if may_be_absent and not isinstance(kind, QuestionAnswering):
        raise UserError(
            f"version_2_with_negative is for question answering, which {folder} is not trained for"
        )
    if isinstance(kind, TokenClassification):
        tagger = kind.bound(config)
        return Answers("entities", len(tagger.names), tagger.names, windowed=tagger)
    if isinstance(kind, QuestionAnswering):
        reader = kind.bound(config)
        return Answers(
            "answer",
            2,
            windowed=replace(reader, may_be_absent=True) if may_be_absent else reader,
        )
    if isinstance(kind, (SingleLabel, MultiLabel, Regression)):
        count, problem = int(config.num_labels), getattr(config, "problem_type", None)
        names = tuple(str(config.id2label[index]) for index in range(count))
        if problem == "multi_label_classification":
            return Answers("labels", count, names, thresholds=MULTI_LABEL.bound(config).thresholds)
        if problem == "regression" and count > 1:
            return Answers("scores", count)
        return Answers("score", 1) if count == 1 else Answers("class", count, names)
    heads = [
        name for name in config.architectures or [] if "For" in name and "MaskedLM" not in name
    ]
    if heads:
        raise UserError(
            f"{folder} is a {heads[0]}, whose answers are of no known kind; give a model for classification, token "
            "classification or question answering, or an encoder of sentence-transformers"
        )
    pooling = read_pooling(resolve_model(folder))
    if pooling is None:
        raise UserError(
            f"{folder} is a bare encoder without modules.json, so nothing says how its vectors are made; give a "
            "fine-tuned classifier or an encoder of sentence-transformers"
        )
    return Answers("vector", config.hidden_size * len(pooling.modes), pooling=pooling)
