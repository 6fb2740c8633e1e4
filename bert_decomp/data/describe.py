"""What a task's examples are as the model sees them: classes counted, lengths measured, splits compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from .batches import LONGEST_TOKEN, length_limit
from .schema import Reading, Schema, SplitSchema

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .task import Task

# Characters of an example that are shown.
MAX_EXAMPLE = 160
# Texts that are tokenized at a time.
BLOCK = 1000


def describe(task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Schema:
    """What was understood of a task, each text seen through the tokenizer.

    Args:
        max_seq_length: tokens to which longer inputs are cut, or fewer where the model takes no more.
    """
    parts = {"train": task.train, "validation": task.validation, **task.others}
    splits = tuple(
        describe_split(
            name,
            part,
            task.readings.get(name, Reading(f"{task.name}, {name}", len(part))),
            task.label_names,
            tokenizer,
            max_seq_length,
        )
        for name, part in parts.items()
        if len(part)
    )
    by_name = {split.name: split for split in splits}
    notes = []
    if "train" in by_name and "validation" in by_name:
        notes += _class_differences(by_name["train"], by_name["validation"])
    notes += [
        note
        for name, part in parts.items()
        if name != "train" and len(part)
        for note in _shared_texts(task.train, part, name)
    ]
    return Schema(task.name, splits, tuple(notes))


def describe_split(
    name: str,
    data: Dataset,
    reading: Reading,
    label_names: tuple[str, ...] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> SplitSchema:
    """What was understood of one split of a ``Task``.

    Args:
        label_names: names of the classes in order, or None for scores.
    """
    kind, counts, score_range, shown = _labels(data, label_names)
    limit = length_limit(tokenizer, max_seq_length)
    lengths = _lengths(data, tokenizer, limit)
    text = tokenizer.decode(
        _token_ids(data[:1], tokenizer, limit, truncation=True, max_length=limit)[0]
    )
    if len(text) > MAX_EXAMPLE:
        text = text[:MAX_EXAMPLE] + " ..."
    return SplitSchema(
        name,
        reading,
        len(data),
        kind,
        counts,
        score_range,
        f"{text} -> {shown}" if shown else text,
        max(lengths),
        sum(length > limit for length in lengths),
        limit,
    )


def _labels(
    data: Dataset, label_names: tuple[str, ...] | None
) -> tuple[str, dict[str, int] | None, tuple[float, float] | None, str]:
    """What the labels of a split are: kind, counts, range and the first one, as ``SplitSchema`` has them."""
    if "answers" in data.column_names:
        answers = data["answers"][:]
        given = sum(map(bool, answers))
        counts = {"with an answer": given, "without one": len(answers) - given}
        return "answers", counts, None, answers[0][0]["text"] if answers[0] else "no answer"
    if "label" not in data.column_names:
        return "no labels", None, None, ""
    labels = data["label"][:]
    if label_names is None:
        return "scores", None, (min(labels), max(labels)), f"{labels[0]:g}"
    if "tokens" in data.column_names:
        counted = Counter(chain.from_iterable(labels))
        kind, shown = "tags", " ".join(label_names[label] for label in labels[0])
    elif isinstance(labels[0], list):
        counted = Counter(
            {index: int(sum(column)) for index, column in enumerate(zip(*labels, strict=True))}
        )
        kind = "sets of labels"
        shown = ", ".join(n for n, has in zip(label_names, labels[0], strict=True) if has) or "none"
    else:
        counted, kind, shown = Counter(labels), "classes", label_names[labels[0]]
    return kind, {name: counted[i] for i, name in enumerate(label_names)}, None, shown


def _lengths(data: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Tokens of each example before it is cut."""
    lengths: list[int] = []
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        lengths += map(len, _token_ids(block, tokenizer, limit, truncation=False, verbose=False))
    return lengths


def _token_ids(
    block: dict[str, list], tokenizer: PreTrainedTokenizerBase, limit: int, **settings: Any
) -> list[list[int]]:
    """The token ids of some examples, of which at most ``limit`` tokens are needed."""
    if "tokens" in block:
        return tokenizer(block["tokens"], is_split_into_words=True, **settings)["input_ids"]
    letters = limit * LONGEST_TOKEN
    texts = [
        [text[:letters] for text in block[name]]
        for name in ("text", "text_pair", "question", "context")
        if name in block
    ]
    return tokenizer(*texts, **settings)["input_ids"]


def _class_differences(train: SplitSchema, validation: SplitSchema) -> list[str]:
    if train.classes is None or validation.classes is None:
        return []
    notes = []
    for one, other in ((train, validation), (validation, train)):
        lacking = [
            name
            for name, count in (one.classes or {}).items()
            if count and not (other.classes or {}).get(name)
        ]
        if lacking:
            notes.append(f"{other.name} has no example of: {', '.join(map(repr, lacking[:8]))}")
    return notes


def _texts(data: Dataset) -> list[tuple[str, ...]]:
    columns: Sequence[list[str]] = [
        data[column][:]
        for column in ("text", "text_pair", "tokens", "question", "context")
        if column in data.column_names
    ]
    return [tuple(map(str, row)) for row in zip(*columns, strict=True)]


def _shared_texts(train: Dataset, part: Dataset, name: str) -> list[str]:
    known = set(_texts(train))
    shared = sum(text in known for text in _texts(part))
    return [f"{shared} of {len(part)} texts of {name} are in train too"] if shared else []
