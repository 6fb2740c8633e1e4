"""Sentences of tokens, each with a tag, from the user's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import columns
from .columns import find_column
from .files import hold_out
from .label_sets import sets_of_lists
from .labels import Labels, classes
from .model_labels import ModelLabels
from .schema import Reading
from .table import Table
from .tables import read_table
from .task import Task, name_of_files
from .token_windows import MOST_TOKENS

if TYPE_CHECKING:
    from datasets import Dataset

# Names of the columns in data sets of the hub.
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags")
OUTSIDE = "O"


@dataclass(frozen=True)
class Sentences:
    """One file: tokens, tags as they are written (None without a column of tags), and how it was read."""

    table: Table
    tokens: list[list[str]]
    tags: list[list[Any]] | None
    reading: Reading

    @property
    def names(self) -> tuple[str, ...] | None:
        """The tags that the file itself names, in order."""
        return self.table.class_names.get(self.reading.label_column or "")

    def dataset(self, labels: list[list[int]] | None) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict(
            {"tokens": self.tokens, **({} if labels is None else {"label": labels})}
        )


def read_sentences(
    path: str, text_column_names: Sequence[str] | None, label_column_name: str
) -> Sentences:
    """Read one file of tokens and tags: CoNLL, or lists in JSON-lines or Parquet.

    Raises:
        UserError: the file cannot be used, or has no column of tokens, or one of other length than its tags.
    """
    table = read_table(path)
    name = column_of_words(table, text_column_names)
    if name is None:
        raise UserError(
            f"{path} has no column of lists of tokens; it has {', '.join(table.columns)}: name it with "
            "text_column_names, or give a .conll file"
        )
    tokens = words_of(table, name)
    label = _first(table, (label_column_name, *(TAGS if label_column_name == "label" else ())))
    tags = None if label is None else sets_of_lists(table, label)
    if label is not None and tags is None:
        raise UserError(f"{path}: the column {label!r} holds no lists of tags, one a token")
    wrong = [
        row for row, words in enumerate(tokens) if tags is not None and len(tags[row]) != len(words)
    ]
    if wrong:
        raise UserError(
            f"{path}: {table.where(wrong)}: there must be as many tags as tokens; correct or remove them"
        )
    unused = tuple(column for column in table.columns if column not in (name, label))
    reading = Reading(path, len(table), table.layout, (name,), label, unused, notes=table.notes)
    return Sentences(table, tokens, tags, reading)


def column_of_words(table: Table, names: Sequence[str] | None = None) -> str | None:
    """The column of lists of words: the one that the user names, or one with a name that the hub's data sets have."""
    name = _first(table, names or TOKENS)
    return name if name is not None and sets_of_lists(table, name) is not None else None


def words_of(table: Table, column: str) -> list[list[str]]:
    """The words of each row of a column of lists.

    Raises:
        UserError: a row has no words, one that is empty, or too many.
    """
    lists = sets_of_lists(table, column)
    rows = [[str(word) for word in row] for row in lists or [[]] * len(table)]
    wrong = [
        row
        for row, words in enumerate(rows)
        if not words or not all(word.strip() for word in words) or len(words) >= MOST_TOKENS
    ]
    if wrong:
        raise UserError(
            f"{table.path}: {table.where(wrong)}: there must be at least one token, and none may be empty; correct or "
            "remove them"
        )
    return rows


def text_columns(table: Table, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The column that holds the words to be tagged: lists of them, or texts.

    Raises:
        UserError: there is none, or it is not clear which.
    """
    words = column_of_words(table, names)
    if words is not None:
        return (words,)
    found = columns.text_columns(table, [name for name in TAGS if name in table.columns], names)
    if len(found) > 1:
        raise UserError(
            f"{table.path}: the columns {' and '.join(map(repr, found))} were taken, but words of one text a row are "
            "tagged; name it with text_column_names"
        )
    return found


def _first(table: Table, names: Sequence[str]) -> str | None:
    return next((found for name in names if (found := find_column(table, name)) is not None), None)


def _tag_order(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values), key=lambda tag: (tag != OUTSIDE, tag)))


def _numbering(source: Sentences, model: ModelLabels | None) -> Callable[[Sentences], Labels]:
    """The function that numbers a file's tags, as the model does or in the order of ``source``."""
    if model is not None:
        names, lacks = model.names or tuple(map(str, range(model.count))), "the model lacks"
    else:
        written = [str(tag) for tag in chain.from_iterable(source.tags or [])]
        names = source.names or _tag_order(written)
        lacks = f"{source.reading.source} lacks"
        if len(names) < 2:
            raise UserError(f"{source.reading.source} has one tag alone; at least two are needed")

    def number(sentences: Sentences) -> Labels:
        path, flat = sentences.reading.source, list(chain.from_iterable(sentences.tags or []))
        numbered = classes(path, flat, names, lacks, by_index=model is not None)
        numbers = iter(numbered.values)
        return replace(
            numbered, values=[[next(numbers) for _ in row] for row in sentences.tags or []]
        )

    return number


def _with_labels(sentences: Sentences, labels: Labels) -> tuple[Dataset, Reading]:
    reading = sentences.reading
    return sentences.dataset(labels.values), replace(
        reading, written=labels.written, notes=reading.notes + labels.notes
    )


def load_tagged(
    path: str,
    model: ModelLabels,
    text_column_names: Sequence[str] | None = None,
    label_column_name: str = "label",
) -> tuple[Dataset, Reading]:
    """One file as ``tokens`` and ``label``, its tags numbered as a model numbers them.

    Raises:
        UserError: the file cannot be used, or has a tag that the model lacks.
    """
    sentences = read_sentences(path, text_column_names, label_column_name)
    if sentences.tags is None:
        raise _no_tags(sentences)
    return _with_labels(sentences, _numbering(sentences, model)(sentences))


def _no_tags(sentences: Sentences) -> UserError:
    return UserError(
        f"{sentences.reading.source} has no column of tags; it has {', '.join(sentences.table.columns)}: name it with "
        "label_column_name"
    )


def load_sentences(
    train_file: str,
    validation_file: str | None,
    text_column_names: Sequence[str] | None,
    label_column_name: str,
    model: ModelLabels | None,
    kind: str,
) -> Task:
    """Read a task of tokens and tags; training sentences may lack tags if a validation file has them.

    Raises:
        UserError: a file cannot be used, or a tag occurs only in validation.
    """
    train = read_sentences(train_file, text_column_names, label_column_name)
    held_out = None
    if validation_file is not None:
        held_out = read_sentences(validation_file, text_column_names, label_column_name)
    source = train if train.tags is not None or held_out is None else held_out
    for sentences in (source, held_out or source):
        if sentences.tags is None:
            raise _no_tags(sentences)
    number = _numbering(source, model)
    names = number(source).names
    data, reading = train.dataset(None), train.reading
    if train.tags is not None:
        data, reading = _with_labels(train, number(train))
    if held_out is not None:
        validation, of_held_out = _with_labels(held_out, number(held_out))
        readings = {"train": reading, "validation": of_held_out}
    else:
        data, validation, readings = hold_out(data, reading, "sentence")
    return Task(name_of_files(train_file), data, validation, names, readings=readings, kind=kind)
