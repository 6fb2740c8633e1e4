"""The span of a text that answers a question: cross-entropy of its first and last token, exact match and F1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.question_windows import (
    BESIDE,
    BETWEEN,
    POSITIONS,
    Collator,
    encode_questions,
    windows_of,
)
from ..data.questions import check_answered, load_questions, read_questions, text_columns
from ..errors import UserError
from .kind import Kind, drawn_cross_entropy, leading_first, softened_divergence
from .spans import best_spans, chosen_windows, squad_scores

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.files import ReadOptions
    from ..data.schema import Reading
    from ..data.table import Table
    from ..data.task import Task

# The logit of padding: no probability, and yet a number that can be subtracted.
NOTHING = -1e4


@dataclass(frozen=True)
class Answer:
    """What a question is answered.

    Attributes:
        number: of the question.
        window: that holds the answer.
        start, end: of the answer in the window's part of the context, in characters; None for no answer.
        score: probability of the answer, or of none, in that window.
    """

    number: int
    window: int
    start: int | None
    end: int | None
    score: float


@dataclass(frozen=True)
class QuestionAnswering(Kind):
    """Answers are logits (windows, 2, tokens) of the span's first and last token.

    A window is a question with a part of its context; the windows of a question are put together.

    Attributes:
        may_be_absent: whether a question may have no answer.
    """

    may_be_absent: bool = False

    name = "question_answering"
    auto = AutoModelForQuestionAnswering
    head = "ForQuestionAnswering"
    pipeline_tag = "question-answering"
    outputs = ("start_logits", "end_logits")
    label_columns = POSITIONS
    labelled = row_per_example = False
    windowed = True

    def bound(self, config: Any) -> QuestionAnswering:
        absent = bool(getattr(config, "has_unanswerable", self.may_be_absent))
        return self if absent == self.may_be_absent else replace(self, may_be_absent=absent)

    def loaded(self, folder: str | Path, config: Any) -> QuestionAnswering:
        if config.num_labels != 2:
            raise UserError(
                f"{folder} has {config.num_labels} outputs a token; a model for question answering has 2"
            )
        return self

    def head_config(self, task: Task) -> dict[str, Any]:
        return {"num_labels": 2}

    # Data

    def read(self, train_file: str, validation_file: str | None, options: ReadOptions) -> Task:
        columns = options.text_columns, options.label_column
        return load_questions(train_file, validation_file, *columns, self.name)

    def read_held_out(self, path: str, options: ReadOptions) -> tuple[Dataset, Reading]:
        data, reading = read_questions(path, options.text_columns, options.label_column)
        check_answered(data, reading)
        return data, reading

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        return encode_questions(data, tokenizer, max_seq_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return Collator(tokenizer)

    def settle_(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> None:
        """``has_unanswerable``: whether some training question has no answer, so that none may be given."""
        model.config.has_unanswerable = any(
            bool((batch["accepted"] < 0).all(-1).any()) for batch in batches
        )

    # Texts without labels

    def text_columns(self, table: Table, names: Sequence[str] | None) -> tuple[str, ...]:
        return text_columns(table, names)

    def windows(
        self, texts: Sequence[Sequence[Any]], tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Of questions and their contexts; see ``data.question_windows.windows_of``."""
        encoded = windows_of(texts[0], texts[1], tokenizer, longest)
        return encoded, {name: encoded.pop(name) for name in (*BESIDE[:-1], "offset")}

    def found(
        self, outputs: Sequence[np.ndarray], places: Any, texts: Sequence[Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The ``answer`` to each question, its ``start`` and ``end`` in the context (characters) and its ``score``, a
        probability; the first three are None where no answer is given."""
        if not outputs:
            return []
        logits = self.joined([torch.from_numpy(one).T[None] for one in outputs]).numpy()
        first, last = (
            self.joined([torch.from_numpy(one)[None] for one in places[name]]).numpy()
            for name in ("first", "last")
        )
        question = np.array(places["question"])
        rows = []
        for answer in choose(logits, first, last, question, self.may_be_absent):
            text = start = end = None
            if answer.start is not None and answer.end is not None:
                offset = places["offset"][answer.window]
                start, end = offset + answer.start, offset + answer.end
                text = texts[1][answer.number][start:end]
            rows.append({"answer": text, "start": start, "end": end, "score": answer.score})
        return rows

    # Answers and losses

    def answers(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 1)
        return logits.masked_fill(~inputs["attention_mask"].bool()[:, None], NOTHING)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of several batches, padded to the widest."""
        widest = max(part.shape[-1] for part in parts)
        return torch.cat(
            [
                F.pad(
                    part,
                    (0, widest - part.shape[-1]),
                    value=NOTHING if part.is_floating_point() else -1,
                )
                if part.ndim > 1
                else part
                for part in parts
            ]
        )

    def truth(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in BESIDE if name in batch}

    def decisions(self, answers: Tensor) -> Tensor | None:
        return None

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Cross-entropy against a first and a last token drawn from softmax(answers / temperature)."""
        return drawn_cross_entropy(answers.flatten(0, 1), temperature, generator)

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) over the tokens of a window at a temperature, times its square; the sum of first and
        last, mean over windows."""
        return softened_divergence(student, teacher, temperature)

    # Metrics

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """f1 (of words) and exact_match as SQuAD counts them; if some questions have no answer, f1_answerable of the
        others and accuracy_unanswerable of these."""
        accepted = {
            int(number): _text(row).split(BETWEEN)
            for number, row in zip(truth["question"], truth["accepted"], strict=True)
        }
        without = {number for number, texts in accepted.items() if texts == [""]}
        first, last, question = (truth[name] for name in ("first", "last", "question"))
        scores: dict[int, tuple[float, float]] = {}
        for answer in choose(answers, first, last, question, bool(without)):
            given = ""
            if answer.start is not None:
                given = _text(truth["text"][answer.window])[answer.start : answer.end]
            scores[answer.number] = squad_scores(given, accepted[answer.number])
        exact, f1 = np.mean(list(scores.values()), 0).tolist()
        found = {"f1": f1, "exact_match": exact}
        if without:
            answerable = [score for number, (_, score) in scores.items() if number not in without]
            if answerable:
                found["f1_answerable"] = float(np.mean(answerable))
            found["accuracy_unanswerable"] = float(np.mean([scores[n][0] for n in sorted(without)]))
        return leading_first(found, leading)

    def metric_names(self, task: Task) -> tuple[str, ...]:
        return ("span_accuracy",)

    def metrics_in_training(self, found: Any) -> dict[str, float]:
        """span_accuracy: windows whose first and last token are both right. Texts are compared after training."""
        right = [
            given.argmax(-1) == wanted
            for given, wanted in zip(found.predictions, found.label_ids, strict=True)
        ]
        return {"span_accuracy": float(np.mean(right[0] & right[1]))}


def choose(
    logits: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    question: np.ndarray,
    may_be_absent: bool,
) -> Iterator[Answer]:
    """The answer to each question, from all its windows; see ``spans.chosen_windows``.

    Args:
        logits: (windows, 2, tokens) of a span's first and last token.
        first, last: where each token begins and ends in its window's part of the context, -1 for those that are not of
            the context (windows, tokens).
        question: of each window (windows,).
        may_be_absent: whether no answer may be given.
    """
    spans = best_spans(logits, first >= 0)
    for number, window, answered in chosen_windows(spans, question, may_be_absent):
        start = end = None
        score = spans.absent[window]
        if answered:
            start = int(first[window, spans.first[window]])
            end = int(last[window, spans.last[window]])
            score = spans.score[window]
        yield Answer(number, window, start, end, float(np.exp(score - spans.scale[window])))


def _text(row: np.ndarray) -> str:
    """The text that numbers of characters stand for, without padding."""
    return "".join(map(chr, row[row >= 0]))


QUESTION_ANSWERING = QuestionAnswering()
