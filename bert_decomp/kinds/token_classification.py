"""A tag for every token (names, chunks, parts of speech): cross-entropy over tokens, spans scored by seqeval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..data.token_windows import IGNORED, MOST_TOKENS, Word, encode_sentences, windows_of
from ..data.tokens import load_sentences, load_tagged, text_columns
from ..errors import UserError
from ..extras import require
from .entities import entities, of_spans
from .kind import leading_first, probabilities
from .single_label import SingleLabel

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.files import ReadOptions
    from ..data.schema import Reading
    from ..data.table import Table
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
    pipeline_tag = "token-classification"
    row_per_example = False
    windowed = True

    def bound(self, config: Any) -> TokenClassification:
        return replace(self, names=tuple(config.id2label[i] for i in range(config.num_labels)))

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

    # Texts without tags

    def text_columns(self, table: Table, names: Sequence[str] | None) -> tuple[str, ...]:
        return text_columns(table, names)

    def windows(
        self, texts: Sequence[Sequence[Any]], tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> tuple[dict[str, list[Any]], list[list[Word]]]:
        """Of texts, or of sentences that are split into words; see ``data.token_windows.windows_of``."""
        return windows_of(texts[0], tokenizer, longest)

    def found(
        self, outputs: Sequence[np.ndarray], places: Any, texts: Sequence[Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The ``entities`` of each text: ``label``, ``text``, ``start`` and ``end`` (characters) and ``score``, the
        mean probability of its words' tags. Of a sentence that is split into words ``tags`` and ``scores``, one a word;
        None for a word of which the tokenizer makes nothing."""
        rows = []
        for text, words in zip(texts[0], places, strict=True):
            logits = [outputs[word.window][word.position] for word in words]
            values = probabilities(np.array(logits).reshape(len(words), -1))
            best = values.argmax(-1) if len(words) else []
            tags = [self.names[tag] for tag in best]
            scores = [float(value[tag]) for value, tag in zip(values, best, strict=True)]
            rows.append(
                self._entities(text, words, tags, scores)
                if isinstance(text, str)
                else _by_word(len(text), words, tags, scores)
            )
        return rows

    def _entities(
        self, text: str, words: Sequence[Word], tags: list[str], scores: list[float]
    ) -> dict[str, Any]:
        found = []
        for label, first, last in entities(tags, self.names):
            start, end = words[first].start, words[last].end
            score = float(np.mean(scores[first : last + 1]))
            found.append(
                {
                    "label": label,
                    "text": text[start:end],
                    "start": start,
                    "end": end,
                    "score": score,
                }
            )
        return {"entities": found}

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
        if not of_spans(self.names):
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


def _by_word(
    count: int, words: Sequence[Word], tags: list[str], scores: list[float]
) -> dict[str, Any]:
    by_word: dict[str, list[Any]] = {"tags": [None] * count, "scores": [None] * count}
    for word, tag, score in zip(words, tags, scores, strict=True):
        by_word["tags"][word.number], by_word["scores"][word.number] = tag, score
    return by_word


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
