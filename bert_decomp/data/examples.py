"""``Examples``: one file of text with its labels as they are written, its columns chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .columns import find_column, text_columns, texts_of
from .label_sets import sets_of_columns, sets_of_lists
from .labels import Labels, label_values
from .schema import Reading
from .table import Table
from .tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Examples:
    """One file: texts, labels as they are written (None without a label column), and how it was read.

    ``label_names`` are the labels that the file itself names, in order; ``several`` if a row has a list of them.
    """

    table: Table
    texts: dict[str, list[str]]
    labels: list[Any] | None
    reading: Reading
    label_names: tuple[str, ...] | None
    several: bool

    @property
    def path(self) -> str:
        return self.table.path

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
    path: str,
    text_column_names: Sequence[str] | None,
    label_column_name: str,
    read: Callable[[str], Table] = read_table,
) -> Examples:
    """Read one file and choose its columns.

    Args:
        read: reads the file.

    Raises:
        UserError: the file cannot be used, or it is not clear which columns hold the text.
    """
    table = read(path)
    label_columns = _label_columns(table, label_column_name)
    columns = text_columns(table, label_columns, text_column_names)
    texts, notes = texts_of(table, columns)
    reading = Reading(
        path,
        len(table),
        table.layout,
        columns,
        ", ".join(label_columns) or None,
        tuple(name for name in table.columns if name not in (*label_columns, *columns)),
        notes=table.notes + notes,
    )
    if len(label_columns) > 1:
        sets: list[Any] = sets_of_columns(table, label_columns)
        return Examples(table, texts, sets, reading, label_columns, several=True)
    if not label_columns:
        return Examples(table, texts, None, reading, None, several=False)
    (label,) = label_columns
    lists = sets_of_lists(table, label)
    labels = lists if lists is not None else label_values(table, label)
    return Examples(
        table, texts, labels, reading, table.class_names.get(label), several=lists is not None
    )


def _label_columns(table: Table, names: str) -> tuple[str, ...]:
    """The columns of labels: one, several separated by commas, or none if there is none of that name.

    Raises:
        UserError: some of several are there.
    """
    label = find_column(table, names)
    if label is not None or "," not in names:
        return () if label is None else (label,)
    found = {name: find_column(table, name) for name in names.split(",")}
    absent = [name for name, column in found.items() if column is None]
    if absent and len(absent) < len(found):
        raise UserError(
            f"{table.path} has no column {absent[0]!r}; label_column_name may name {', '.join(table.columns)}"
        )
    return tuple(column for column in found.values() if column is not None)
