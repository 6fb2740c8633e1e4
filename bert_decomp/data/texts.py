"""Text alone, or pairs of texts with scores, from the user's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .examples import Examples, read_examples
from .files import hold_out
from .labels import scores
from .schema import Reading
from .task import Task, name_of_files

if TYPE_CHECKING:
    from datasets import Dataset


def read_texts(
    path: str, text_column_names: Sequence[str] | None = None, label_column_name: str = "label"
) -> tuple[Dataset, Reading]:
    """One file as ``text``, or ``text``, ``text_pair`` and, if the file has a column of scores, ``label``.

    Labels of single texts are left out.

    Raises:
        UserError: the file cannot be used, or the scores of pairs are no numbers.
    """
    examples = read_examples(path, text_column_names, label_column_name)
    scored = examples.labels is not None and len(examples.texts) == 2
    labels = scores(path, examples.labels or []) if scored else None
    return examples.dataset(labels), _reading(examples) if labels is None else examples.read_as(
        labels
    )


def _reading(examples: Examples) -> Reading:
    """How a file without scores was read: its labels, if it has some, are not used."""
    reading, label = examples.reading, examples.reading.label_column
    unused = (*reading.unused, *([] if label is None else [label]))
    return Reading(
        reading.source,
        reading.rows,
        reading.layout,
        reading.text_columns,
        None,
        unused,
        notes=reading.notes,
    )


def load_texts(
    train_file: str,
    validation_file: str | None,
    text_column_names: Sequence[str] | None,
    label_column_name: str,
    kind: str,
) -> Task:
    """Read text to train on, and held-out text (a tenth of the training texts without a file).

    Raises:
        UserError: a file cannot be used.
    """
    train, reading = read_texts(train_file, text_column_names, label_column_name)
    name = name_of_files(train_file)
    if validation_file is not None:
        held_out, of_held_out = read_texts(validation_file, text_column_names, label_column_name)
        readings = {"train": reading, "validation": of_held_out}
    else:
        train, held_out, readings = hold_out(train, reading, "text")
    if "label" in train.column_names:
        train = train.remove_columns("label")
    return Task(name, train, held_out, None, readings=readings, kind=kind)
