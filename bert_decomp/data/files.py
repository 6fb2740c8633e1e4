"""The user's own labelled examples: CSV, TSV, JSON-lines or Parquet files as a ``Task``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .examples import Examples, read_examples
from .model_labels import MULTI_LABEL, PROBLEM_TYPES, ModelLabels
from .numbering import is_multi_label, numbering
from .schema import Reading
from .table import Table
from .tables import read_table
from .task import Task, name_of_files

if TYPE_CHECKING:
    from datasets import Dataset

# A tenth held out of a file never depends on the run's seed: every run is judged on the same examples.
SPLIT_SEED = 2020


@dataclass(frozen=True)
class ReadOptions:
    """How a user's file is to be read.

    Attributes:
        text_columns: names of the columns with text; None to find them.
        label_column: name of the column with labels, or several names with commas between.
        model: what the model's config says of its labels; None for a head that is new, and where it says nothing.
        problem_type: the kind of task that was asked for, if one was.
    """

    text_columns: Sequence[str] | None = None
    label_column: str = "label"
    model: ModelLabels | None = None
    problem_type: str | None = None


def load_labelled(
    path: str,
    model: ModelLabels,
    text_column_names: Sequence[str] | None = None,
    label_column_name: str = "label",
    read: Callable[[str], Table] = read_table,
) -> tuple[Dataset, Reading]:
    """One file as ``text`` [, ``text_pair``], ``label``, its labels numbered as a model numbers them.

    Args:
        read: reads the file.

    Returns:
        The examples, and how they were read.

    Raises:
        UserError: the file cannot be used, or has a label that the model lacks.
    """
    examples = read_examples(path, text_column_names, label_column_name, read)
    if examples.labels is None:
        raise _no_label(examples, label_column_name)
    labels = numbering(examples, model, model.problem_type)(examples)
    return examples.dataset(labels), examples.read_as(labels)


def load_files(
    train_file: str,
    validation_file: str | None,
    text_column_names: Sequence[str] | None = None,
    label_column_name: str = "label",
    model: ModelLabels | None = None,
    problem_type: str | None = None,
    read: Callable[[str], Table] = read_table,
    held_out_by: str | None = None,
) -> Task:
    """Read a task from CSV, TSV, JSON-lines or Parquet files.

    Without a validation file a tenth of the training examples is held out, always the same. Training examples may
    lack the label column if a validation file has it.

    Args:
        text_column_names: one or two columns; chosen by their names or their content if left out.
        model: the labels of a fine-tuned classifier, by which the file's are numbered. Without it labels with fractions
            are scores, and all others classes, sorted by name.
        problem_type: one of ``PROBLEM_TYPES``, where a file without a model may be read in several ways.
        read: reads a file.
        held_out_by: the column by which examples are held out, so that none of its values is on both sides.

    Raises:
        UserError: a file is absent, empty, unreadable or ambiguous, a column is absent, or a label occurs only in
            validation.
    """
    if problem_type not in (None, *PROBLEM_TYPES):
        raise UserError(
            f"unknown problem_type {problem_type!r}; choose {' or '.join(PROBLEM_TYPES)}"
        )
    if model is not None and problem_type not in (None, model.problem_type):
        what = "one output" if model.is_score else "several labels" if model.several else "classes"
        raise UserError(f"problem_type is {problem_type} but the model has {what}; leave it out")
    train = read_examples(train_file, text_column_names, label_column_name, read)
    held_out = None
    if validation_file is not None:
        held_out = _read_alike(validation_file, train, text_column_names, label_column_name, read)
    source = train if train.labels is not None else held_out
    if (
        source is None
        or source.labels is None
        or (held_out is not None and held_out.labels is None)
    ):
        lacks = held_out if train.labels is not None and held_out is not None else train
        raise _no_label(lacks, label_column_name)
    number = numbering(source, model, problem_type)
    kind = MULTI_LABEL if is_multi_label(source, model, problem_type) else ""
    train_labels = None if train.labels is None else number(train)
    data, reading = train.dataset(train_labels), train.read_as(train_labels)
    name = name_of_files(train_file)
    if held_out is not None:
        labels = number(held_out)
        return Task(
            name,
            data,
            held_out.dataset(labels),
            labels.names,
            readings={"train": reading, "validation": held_out.read_as(labels)},
            kind=kind,
        )
    names = train_labels.names if train_labels else None
    if held_out_by is None:
        data, validation, readings = hold_out(data, reading, "example")
    else:
        data, validation, readings = hold_out_groups(data, data[held_out_by], reading, "query")
    return Task(name, data, validation, names, readings=readings, kind=kind)


def hold_out(
    data: Dataset, reading: Reading, word: str
) -> tuple[Dataset, Dataset, dict[str, Reading]]:
    """Hold out a tenth of the examples, always the same; see ``hold_out_groups``, whose groups are examples here."""
    if len(data) < 2:
        raise _one_alone(reading, word)
    parts = data.train_test_split(test_size=0.1, seed=SPLIT_SEED)
    train, held_out = parts["train"], parts["test"]
    return train, held_out, reading.divided(len(train), len(held_out))


def hold_out_groups(
    data: Dataset, groups: Sequence[Hashable], reading: Reading, word: str
) -> tuple[Dataset, Dataset, dict[str, Reading]]:
    """Hold out a tenth of the groups, always the same, so that no group is on both sides.

    Args:
        groups: of each example.
        reading: how the file was read.
        word: what a group is, for a message.

    Returns:
        Examples to train on, those held out, and both readings by split.

    Raises:
        UserError: there is one group alone.
    """
    different = list(dict.fromkeys(groups))
    if len(different) < 2:
        raise _one_alone(reading, word)
    mixed = np.random.default_rng(SPLIT_SEED).permutation(len(different))
    chosen = {different[index] for index in mixed[: -(-len(different) // 10)]}
    rows: list[list[int]] = [[], []]
    for row, group in enumerate(groups):
        rows[group in chosen].append(row)
    train, held_out = (data.select(part) for part in rows)
    return train, held_out, reading.divided(len(train), len(held_out))


def _one_alone(reading: Reading, word: str) -> UserError:
    return UserError(f"{reading.source} has one {word}; give a validation_file, or more {word}s")


def _read_alike(
    path: str,
    train: Examples,
    names: Sequence[str] | None,
    label_column_name: str,
    read: Callable[[str], Table],
) -> Examples:
    """A validation file, with the columns of the training file if it has them."""
    columns = train.reading.text_columns
    if names is None:
        table = read(path)
        names = columns if all(name in table.columns for name in columns) else None
    held_out = read_examples(path, names, label_column_name, read)
    if len(held_out.texts) != len(train.texts):
        raise UserError(
            f"{train.path} has {len(train.texts)} text column(s) but {path} has {len(held_out.texts)}; name them with "
            "text_column_names"
        )
    return held_out


def _no_label(examples: Examples, label_column_name: str) -> UserError:
    return UserError(
        f"{examples.path} has no column {label_column_name!r}; it has {', '.join(examples.table.columns)}: name the "
        "label's with label_column_name"
    )
