"""The user's own labelled examples: CSV, TSV, JSON-lines or Parquet files as a ``Task``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .columns import find_column, text_columns, texts_of
from .labels import (
    Labels,
    class_order,
    classes,
    is_scores,
    label_values,
    scores,
)
from .model_labels import CLASSIFICATION, PROBLEM_TYPES, ModelLabels
from .schema import Reading
from .table import Table
from .tables import read_table
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

# A tenth held out of a file never depends on the run's seed: every run is judged on the same examples.
SPLIT_SEED = 2020


@dataclass(frozen=True)
class Examples:
    """One file: texts, labels as they are written (None without a label column), and how it was read."""

    table: Table
    texts: dict[str, list[str]]
    labels: list[Any] | None
    reading: Reading

    @property
    def path(self) -> str:
        return self.table.path

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that the file itself names, in order."""
        return self.table.class_names.get(self.reading.label_column or "")

    def dataset(self, labels: Labels | None) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({**self.texts, **({"label": labels.values} if labels else {})})

    def read_as(self, labels: Labels | None) -> Reading:
        """The reading with what the labels came to."""
        if labels is None:
            return self.reading
        return replace(
            self.reading, written=labels.written, notes=self.reading.notes + labels.notes
        )


def read_examples(
    path: str, text_column_names: Sequence[str] | None, label_column_name: str
) -> Examples:
    """Read one file and choose its columns.

    Raises:
        UserError: the file cannot be used, or it is not clear which columns hold the text.
    """
    table = read_table(path)
    label = find_column(table, label_column_name)
    columns = text_columns(table, label, text_column_names)
    texts, notes = texts_of(table, columns)
    reading = Reading(
        path,
        len(table),
        table.layout,
        columns,
        label,
        tuple(name for name in table.columns if name != label and name not in columns),
        notes=table.notes + notes,
    )
    return Examples(table, texts, None if label is None else label_values(table, label), reading)


def load_labelled(
    path: str,
    model: ModelLabels,
    text_column_names: Sequence[str] | None = None,
    label_column_name: str = "label",
) -> tuple[Dataset, Reading]:
    """One file as ``text`` [, ``text_pair``], ``label``, its labels numbered as a model numbers them.

    Returns:
        The examples, and how they were read.

    Raises:
        UserError: the file cannot be used, or has a label that the model lacks.
    """
    examples = read_examples(path, text_column_names, label_column_name)
    if examples.labels is None:
        raise _no_label(examples, label_column_name)
    labels = scores(path, examples.labels) if model.is_score else _by_model(examples, model)
    return examples.dataset(labels), examples.read_as(labels)


def load_files(
    train_file: str,
    validation_file: str | None,
    text_column_names: Sequence[str] | None = None,
    label_column_name: str = "label",
    model: ModelLabels | None = None,
    problem_type: str | None = None,
) -> Task:
    """Read a task from CSV, TSV, JSON-lines or Parquet files.

    Without a validation file a tenth of the training examples is held out, always the same. Training examples may
    lack the label column if a validation file has it.

    Args:
        text_column_names: one or two columns; chosen by their names or their content if left out.
        model: the labels of a fine-tuned classifier, by which the file's are numbered. Without it labels with fractions
            are scores, and all others classes, sorted by name.
        problem_type: "regression" or "single_label_classification", where a file without a model may be read as either.

    Raises:
        UserError: a file is absent, empty, unreadable or ambiguous, a column is absent, or a label occurs only in
            validation.
    """
    if problem_type not in (None, *PROBLEM_TYPES):
        raise UserError(
            f"unknown problem_type {problem_type!r}; choose {' or '.join(PROBLEM_TYPES)}"
        )
    if (
        model is not None
        and problem_type is not None
        and model.is_score == (problem_type == CLASSIFICATION)
    ):
        raise UserError(
            f"problem_type is {problem_type} but the model has {'one output' if model.is_score else 'classes'}; "
            "leave it out"
        )
    train = read_examples(train_file, text_column_names, label_column_name)
    held_out = None
    if validation_file is not None:
        held_out = _read_alike(validation_file, train, text_column_names, label_column_name)
    source = train if train.labels is not None else held_out
    if (
        source is None
        or source.labels is None
        or (held_out is not None and held_out.labels is None)
    ):
        lacks = held_out if train.labels is not None and held_out is not None else train
        raise _no_label(lacks, label_column_name)
    number = _numbering(source, model, problem_type)
    train_labels = None if train.labels is None else number(train)
    data, reading = train.dataset(train_labels), train.read_as(train_labels)
    name = Path(train_file).stem
    if held_out is not None:
        labels = number(held_out)
        return Task(
            name,
            data,
            held_out.dataset(labels),
            labels.names,
            readings={"train": reading, "validation": held_out.read_as(labels)},
        )
    if len(data) < 2:
        raise UserError(f"{train_file} has one example; give a validation_file, or more examples")
    parts = data.train_test_split(test_size=0.1, seed=SPLIT_SEED)
    return Task(
        name,
        parts["train"],
        parts["test"],
        train_labels.names if train_labels else None,
        readings={
            "train": reading.without(len(parts["test"]), "held out for validation"),
            "validation": reading.without(len(parts["train"]), "used for training"),
        },
    )


def _read_alike(
    path: str, train: Examples, names: Sequence[str] | None, label_column_name: str
) -> Examples:
    """A validation file, with the columns of the training file if it has them."""
    columns = train.reading.text_columns
    if names is None:
        table = read_table(path)
        names = columns if all(name in table.columns for name in columns) else None
    held_out = read_examples(path, names, label_column_name)
    if len(held_out.texts) != len(train.texts):
        raise UserError(
            f"{train.path} has {len(train.texts)} text column(s) but {path} has {len(held_out.texts)}; name them with "
            "text_column_names"
        )
    return held_out


def _numbering(source: Examples, model: ModelLabels | None, problem_type: str | None) -> Any:
    """The function that numbers a file's labels, decided by the labels of ``source``."""
    values = source.labels or []
    if is_scores(values, model, problem_type):
        return lambda examples: scores(examples.path, examples.labels)
    if model is not None:
        return lambda examples: _by_model(examples, model)
    names = source.class_names or class_order(values, source.path)
    if len(names) < 2:
        raise UserError(
            f"{source.path} has only the label {names[0]!r}; at least two classes are needed"
        )
    return lambda examples: classes(
        examples.path, examples.labels, names, f"{source.path} lacks", by_index=False
    )


def _by_model(examples: Examples, model: ModelLabels) -> Labels:
    """A file's labels as the classes of a model."""
    path, values, lacks = examples.path, examples.labels or [], "the model lacks"
    if model.names is not None:
        return classes(path, values, model.names, lacks, by_index=True)
    if examples.class_names is not None and len(examples.class_names) == model.count:
        return classes(path, values, examples.class_names, lacks, by_index=False)
    return classes(
        path,
        values,
        tuple(map(str, range(model.count))),
        lacks,
        by_index=True,
        advice="the model's classes have no names, so write these numbers, or the names into id2label of its "
        "config.json",
    )


def _no_label(examples: Examples, label_column_name: str) -> UserError:
    return UserError(
        f"{examples.path} has no column {label_column_name!r}; it has {', '.join(examples.table.columns)}: name the "
        "label's with label_column_name"
    )
