"""A tag for every token (names, chunks, parts of speech): cross-entropy over tokens, spans scored by seqeval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.batches import length_limit
from ..data.tokens import IGNORED, MOST_TOKENS, encode_sentences, load_sentences, load_tagged
from ..errors import UserError
from ..extras import require
from .kind import leading_first
from .single_label import SingleLabel

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.files import ReadOptions
    from ..data.schema import Reading
    from ..data.task import Task


@dataclass(frozen=True)
class Collator:
    """Pads windows, their labels and the numbers of their words."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        plain = [{k: v for k, v in example.items() if k != "word"} for example in examples]
        batch = dict(DataCollatorForTokenClassification(self.tokenizer)(plain))
        if "word" in examples[0]:
            width = batch["input_ids"].shape[1]
            rows = []
            for example in examples:
                filling = [-1] * (width - len(example["word"]))
                right = self.tokenizer.padding_side == "right"
                rows.append([*example["word"], *filling] if right else [*filling, *example["word"]])
            batch["word"] = torch.tensor(rows)
        return batch


@dataclass(frozen=True)
class TokenClassification(SingleLabel):
    """Answers are logits (tokens, tags) of all tokens that are no padding; the truth has their labels, or -100.

    Attributes:
        names: of the tags, in order.
    """

    names: tuple[str, ...] = ()

    name = "token_classification"
    problem_type = None
    auto = AutoModelForTokenClassification
    head = "ForTokenClassification"
    row_per_example = False

    def bound(self, config: Any) -> TokenClassification:
        return TokenClassification(tuple(config.id2label[i] for i in range(config.num_labels)))

    # Data

    def read(self, train_file: str, validation_file: str | None, options: ReadOptions) -> Task:
        columns = options.text_columns, options.label_column
        return load_sentences(train_file, validation_file, *columns, options.model, self.name)

    def read_held_out(self, path: str, options: ReadOptions) -> tuple[Dataset, Reading]:
        assert options.model is not None
        return load_tagged(path, options.model, options.text_columns, options.label_column)

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        return encode_sentences(data, tokenizer, length_limit(tokenizer, max_seq_length))

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return Collator(tokenizer)

    def check_examples(self, model: PreTrainedModel, examples: Any) -> None:
        tags = model.config.num_labels
        if "labels" not in (getattr(examples, "column_names", None) or ()):
            return
        for index, labels in enumerate(examples["labels"]):
            wrong = [label for label in labels if label != IGNORED and label not in range(tags)]
            if wrong:
                raise UserError(
                    f"training example {index} has the tag {wrong[0]!r}, but the model's go from 0 to {tags - 1}; "
                    "correct the tags, or take the model that has them"
                )

    # Answers and metrics

    def answers(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        return outputs.logits[inputs["attention_mask"].bool()]

    def truth(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real = batch["attention_mask"].bool()
        return {name: batch[name][real] for name in ("labels", "word")}

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """Of spans (tags with B- or I-) f1, precision and recall as seqeval counts them, and token_accuracy; of other
        tags token_accuracy and f1_macro."""
        kept = np.flatnonzero(truth["labels"] != IGNORED)
        kept = kept[np.argsort(truth["word"][kept], kind="stable")]
        labels, given = truth["labels"][kept], answers[kept].argmax(-1)
        accuracy = float(accuracy_score(labels, given))
        if not any(name.startswith(("B-", "I-")) for name in self.names):
            macro = float(f1_score(labels, given, average="macro", zero_division=0))
            return leading_first({"token_accuracy": accuracy, "f1_macro": macro}, leading)
        starts = np.flatnonzero(np.diff(truth["word"][kept] // MOST_TOKENS)) + 1
        found = _spans(*(self._sentences(tags, starts) for tags in (labels, given)))
        return leading_first({**found, "token_accuracy": accuracy}, leading)

    def _sentences(self, tags: np.ndarray, starts: np.ndarray) -> list[list[str]]:
        return [[self.names[tag] for tag in part] for part in np.split(tags, starts)]

    def metric_names(self, task: Task) -> tuple[str, ...]:
        kind = TokenClassification(task.label_names or ())
        nothing = np.zeros((1, task.num_outputs))
        return tuple(kind.metrics(nothing, {"labels": np.zeros(1, int), "word": np.zeros(1, int)}))

    def metrics_in_training(self, found: Any) -> dict[str, float]:
        rows, columns = found.label_ids.shape
        word = np.arange(rows)[:, None] * MOST_TOKENS + np.arange(columns)
        answers = found.predictions.reshape(rows * columns, -1)
        return self.metrics(answers, {"labels": found.label_ids.ravel(), "word": word.ravel()})


def _spans(labels: list[list[str]], given: list[list[str]]) -> dict[str, float]:
    require("tokens")
    from seqeval import metrics

    scores = (metrics.f1_score, metrics.precision_score, metrics.recall_score)
    names = ("f1", "precision", "recall")
    return {
        name: float(score(labels, given, zero_division=0))
        for name, score in zip(names, scores, strict=True)
    }


TOKEN_CLASSIFICATION = TokenClassification()
