"""Files in which a row is a query with several texts, as pairs of a query and a text with a label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import UserError
from .columns import find_column
from .table import Table
from .tables import read_table

# Names of columns in data sets of sentence-transformers and BGE. A negative text may have a number.
QUERIES = ("query", "question", "anchor")
POSITIVES, NEGATIVES = ("positive", "positives", "pos"), ("negative", "negatives", "neg")
DOCUMENTS, LABELS = ("documents", "docs", "passages"), ("labels", "scores", "label")
NUMBERED = re.compile(r"(negative|positive)_\d+", re.IGNORECASE)


def read_pairs(path: str) -> Table:
    """A file of pairs as it is; one of groups as ``query``, ``passage`` and, if it has labels, ``label``.

    A group has a query and either positive and negative texts (labels 1 and 0; one or a list a column, ``negative_1``,
    ``negative_2`` ...), or a list of ``documents`` and one of ``labels``.

    Raises:
        UserError: the file cannot be read, or a group does not fit.
    """
    table = read_table(path)
    query = _column(table, QUERIES)
    positive, negative = (_columns(table, names) for names in (POSITIVES, NEGATIVES))
    documents = _column(table, DOCUMENTS)
    if documents is not None and not any(
        isinstance(texts, list) for texts in table.columns[documents]
    ):
        documents = None
    if query is None or not (positive or documents):
        return table
    groups: list[list[tuple[str, str | None]]]
    if documents is not None:
        labels = _column(table, LABELS)
        groups = [_listed(table, row, documents, labels) for row in range(len(table))]
        labelled = labels is not None
    else:
        groups = [
            [
                (text, label)
                for label, names in (("1", positive), ("0", negative))
                for name in names
                for text in _texts(table, row, name)
            ]
            for row in range(len(table))
        ]
        labelled = True
    empty = [row for row, group in enumerate(groups) if not group]
    if empty:
        raise UserError(f"{path}: {table.where(empty)}: a query without texts; remove it")
    rows = [row for row, group in enumerate(groups) for _ in group]
    pairs = [pair for group in groups for pair in group]
    columns: dict[str, list[Any]] = {
        "query": [table.columns[query][row] for row in rows],
        "passage": [text for text, _ in pairs],
    }
    if labelled:
        columns["label"] = [label for _, label in pairs]
    # A message names the row of the file.
    numbers = (
        table.lines if table.lines is not None else range(table.first, table.first + len(table))
    )
    note = f"groups: {len(groups)} queries with {len(pairs)} texts"
    return replace(
        table,
        columns=columns,
        lines=[numbers[row] for row in rows],
        class_names={},
        notes=(*table.notes, note),
    )


def _column(table: Table, names: Sequence[str]) -> str | None:
    return next((found for name in names if (found := find_column(table, name)) is not None), None)


def _columns(table: Table, names: Sequence[str]) -> list[str]:
    """The column of one of these names, and those with numbers."""
    first = _column(table, names)
    numbered = [
        name
        for name in table.columns
        if (found := NUMBERED.fullmatch(name)) and found[1].lower() in names
    ]
    return [*([] if first is None else [first]), *numbered]


def _texts(table: Table, row: int, column: str) -> list[str]:
    """One text, a list of them, or none."""
    value = table.columns[column][row]
    texts = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"{table.path}: {table.where([row])}: the column {column!r} must hold a text or a list of texts, none of "
            "them empty"
        )
    return texts


def _listed(
    table: Table, row: int, documents: str, labels: str | None
) -> list[tuple[str, str | None]]:
    texts = _texts(table, row, documents)
    if labels is None:
        return [(text, None) for text in texts]
    grades = table.columns[labels][row]
    if (
        not isinstance(grades, list)
        or len(grades) != len(texts)
        or not all(type(grade) in (int, float) for grade in grades)
    ):
        raise UserError(
            f"{table.path}: {table.where([row])}: the columns {documents!r} and {labels!r} must hold as many texts as "
            "labels, which are numbers"
        )
    return [(text, str(grade)) for text, grade in zip(texts, grades, strict=True)]
