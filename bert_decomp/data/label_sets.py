"""Several labels an example: lists of labels in one column, or columns of 0 and 1, one a label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from ..errors import UserError
from .labels import Labels, classes
from .table import Table

# How "has this label" and "has it not" are written in a column of its own.
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


def sets_of_columns(table: Table, columns: Sequence[str]) -> list[list[str]]:
    """The labels of each row: the names of the columns that hold 1.

    Raises:
        UserError: a column holds something else than 0 and 1.
    """
    sets: list[list[str]] = [[] for _ in range(len(table))]
    for column in columns:
        written = [str(value).strip().lower() for value in table.columns[column]]
        wrong = [row for row, value in enumerate(written) if value not in YES + NO]
        if wrong:
            raise UserError(
                f"{table.path}: {table.where(wrong)}: the column {column!r} is one label of several and must hold 0 or "
                f"1, not {table.columns[column][wrong[0]]!r}"
            )
        for labels, value in zip(sets, written, strict=True):
            if value in YES:
                labels.append(column)
    return sets


def sets_of_lists(table: Table, column: str) -> list[list[Any]] | None:
    """The labels of each row of a column of lists, by name where ``datasets`` wrote names; None if it holds no lists.

    Raises:
        UserError: some rows hold no list, or a list holds something else than labels.
    """
    values = table.columns[column]
    if not any(isinstance(value, (list, tuple)) for value in values):
        return None
    names = table.class_names.get(column)

    def usable(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(
            isinstance(label, (str, int)) and (names is None or label in range(len(names)))
            for label in value
        )

    wrong = [row for row, value in enumerate(values) if not usable(value)]
    if wrong:
        raise UserError(
            f"{table.path}: {table.where(wrong)}: the column {column!r} holds lists of labels, but not there; give "
            "each row a list of names or numbers, [] for none"
        )
    if names is None:
        return [list(value) for value in values]
    return [[names[label] for label in value] for value in values]


def indicators(
    path: str, sets: Sequence[Sequence[Any]], names: tuple[str, ...], lacks: str, by_index: bool
) -> Labels:
    """Sets of labels as rows of 0.0 and 1.0, one column a name; see ``labels.classes``.

    Raises:
        UserError: a label is none of the names.
    """
    flat = classes(path, list(chain.from_iterable(sets)), names, lacks, by_index)
    numbers = iter(flat.values)
    rows = []
    for labels in sets:
        row = [0.0] * len(names)
        for _ in labels:
            row[next(numbers)] = 1.0
        rows.append(row)
    return Labels(rows, names, flat.written, flat.notes)
