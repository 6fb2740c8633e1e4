"""What the labels of a column mean: classes, numbered as the model numbers them, or scores.

``None``, ``NA`` or ``null`` written in a file are names of classes. Whole numbers are class indices where the model's
classes have other names, as everywhere in transformers; ``0.0`` and ``1.0`` are classes, unless the model has one
output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .columns import NUMBER
from .model_labels import REGRESSION, ModelLabels
from .table import Table

# Of at most 18 digits: what is longer is a name.
INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
LEADING_ZERO = re.compile(r"-?0\d+", re.ASCII)
DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")
# More different numbers than this, written like 1.0, are scores. More different labels without a model, unless each has
# two examples on average, are refused.
MAX_CLASSES_OF_FLOATS = 20


@dataclass(frozen=True)
class Labels:
    """The labels of one file.

    Attributes:
        values: class numbers, or scores.
        names: names of the classes in order; None for scores.
        written: how classes are written in the file, where that is not their name.
        notes: what a reader should know.
    """

    values: list[Any]
    names: tuple[str, ...] | None
    written: dict[str, str]
    notes: tuple[str, ...] = ()


def label_values(table: Table, column: str) -> list[Any]:
    """The labels as they are written; names where ``datasets`` wrote names beside integers.

    Raises:
        UserError: rows lack a label, or have several.
    """
    values = table.columns[column]
    several = [row for row, value in enumerate(values) if isinstance(value, (list, dict, tuple))]
    if several:
        raise UserError(
            f"{table.path}: {table.where(several)}: the column {column!r} holds a {type(values[several[0]]).__name__}; "
            "give one label a row"
        )
    if values and all(
        isinstance(value, str) and value.startswith("[") and value.endswith("]") for value in values
    ):
        raise UserError(
            f"{table.path}: {table.where(list(range(len(values))))}: the column {column!r} holds lists of labels as "
            "text; for multi-label classification give lists in JSON-lines or Parquet, or a column of 0 and 1 for each "
            "label"
        )
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise UserError(
            f"{table.path} has rows without text or label ({table.where(missing)}: {column!r}); remove them"
        )
    odd = [row for row, value in enumerate(values) if not isinstance(value, (str, int, float))]
    if odd:
        raise UserError(
            f"{table.path}: {table.where(odd)}: the label is a {type(values[odd[0]]).__name__}; "
            "give text or numbers"
        )
    names = table.class_names.get(column)
    if names is None:
        return _with_decimal_points(values) if table.layout.startswith("CSV with semi") else values
    outside = [row for row, value in enumerate(values) if value not in range(len(names))]
    if outside:
        raise UserError(
            f"{table.path}: {table.where(outside)}: the label {values[outside[0]]} is none of the classes 0 to "
            f"{len(names) - 1}; remove rows without an answer"
        )
    return [names[value] for value in values]


def is_scores(values: Sequence[Any], model: ModelLabels | None, problem_type: str | None) -> bool:
    """Whether labels are scores (regression): the model has one output, the user says so, or they are fractions."""
    if model is not None:
        return model.is_score
    if problem_type is not None:
        return problem_type == REGRESSION
    numbers = _numbers(values)
    if numbers is None or not _with_point(values):
        return False
    fractions = not all(math.isfinite(number) and number.is_integer() for number in numbers)
    return fractions or len(set(numbers)) > MAX_CLASSES_OF_FLOATS


def scores(path: str, values: Sequence[Any]) -> Labels:
    """Labels as finite numbers.

    Raises:
        UserError: one is no finite number.
    """
    numbers = _numbers(values)
    if numbers is None or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{path} has labels that are no finite numbers, but scores are needed (regression)"
        )
    whole = not _with_point(values)
    return Labels(
        numbers, None, {}, ("labels are whole numbers, taken as scores",) if whole else ()
    )


def class_order(values: Sequence[Any], path: str) -> tuple[str, ...]:
    """The names of the classes that a file without a model has: numbers by value, then other names by spelling.

    Raises:
        UserError: nearly every row has a label of its own.
    """
    names = sorted(set(_spelt(values)), key=_label_order)
    if len(names) > max(MAX_CLASSES_OF_FLOATS, len(values) // 2):
        raise UserError(
            f"{path} has {len(names)} different labels in {len(values)} rows; name the label's column with "
            "label_column_name, or say problem_type='regression' if they are scores"
        )
    return tuple(names)


def classes(
    path: str,
    values: Sequence[Any],
    names: tuple[str, ...],
    lacks: str,
    by_index: bool,
    advice: str = "remove those rows, or give the model or examples that have them",
) -> Labels:
    """Labels as class numbers.

    Args:
        names: the classes in order.
        lacks: who lacks a label that is not among them, such as "the model lacks".
        by_index: whether whole numbers may be class indices (and ``LABEL_1`` the class 1).
        advice: what to do about a label that is none of the classes.

    Raises:
        UserError: a label is none of the classes.
    """
    labels = _spelt(values)
    different = sorted(set(labels), key=_label_order)
    index = {name: number for number, name in enumerate(names)}
    mapping = {label: index.get(label) for label in different}
    notes = []
    if None in mapping.values() and by_index:
        for read in (_as_index, _as_placeholder, _other_letters):
            attempt = {label: read(label, names) for label in different}
            if None not in attempt.values() and len(set(attempt.values())) == len(attempt):
                mapping = attempt
                break
    foreign = [label for label, number in mapping.items() if number is None]
    if foreign:
        known = names
        if by_index and foreign == different and all(map(INTEGER.fullmatch, foreign)):
            # They were meant as class numbers, of which some are too high.
            known = tuple(f"{number} ({name})" for number, name in enumerate(names))
            foreign = [label for label in foreign if _as_index(label, names) is None] or foreign
        raise UserError(
            f"{path} has labels that {lacks}: {', '.join(foreign[:5])}; the known ones are "
            f"{', '.join(known[:8])}: {advice}"
        )
    if len(values) and labels != [str(value) for value in values]:
        notes.append("labels with a decimal point are the classes of the whole numbers")
    alike: dict[str, list[str]] = {}
    for label in different:
        alike.setdefault(label.strip().casefold(), []).append(label)
    notes += [
        f"classes that differ in letter case or spaces alone: {', '.join(map(repr, group))}"
        for group in alike.values()
        if len(group) > 1
    ]
    return Labels(
        [mapping[label] for label in labels],
        names,
        {
            label: names[number]
            for label, number in mapping.items()
            if number is not None and names[number] != label
        },
        tuple(notes),
    )


def _as_index(label: str, names: tuple[str, ...]) -> int | None:
    return int(label) if INTEGER.fullmatch(label) and int(label) in range(len(names)) else None


def _as_placeholder(label: str, names: tuple[str, ...]) -> int | None:
    return _as_index(label.removeprefix("LABEL_"), names) if label.startswith("LABEL_") else None


def _other_letters(label: str, names: tuple[str, ...]) -> int | None:
    alike = [i for i, name in enumerate(names) if name.casefold() == label.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """All values as numbers, or None."""
    if all(isinstance(value, str) for value in values):
        if not all(NUMBER.fullmatch(value) for value in values):
            return None
    elif any(isinstance(value, (str, bool)) for value in values):
        return None
    try:
        return [float(value) for value in values]
    except OverflowError:
        return None


def _with_decimal_points(values: list[str]) -> list[str]:
    """Where Excel puts semicolons between fields, it puts commas into numbers."""
    if all(NUMBER.fullmatch(value) or DECIMAL_COMMA.fullmatch(value) for value in values):
        return [value.replace(",", ".") for value in values]
    return values


def _with_point(values: Sequence[Any]) -> bool:
    """Whether any number is written as a fraction (1.0) rather than as a whole number."""
    return any(
        isinstance(value, float) or (isinstance(value, str) and not INTEGER.fullmatch(value))
        for value in values
    )


def _spelt(values: Sequence[Any]) -> list[str]:
    """Labels as text; whole numbers without their point (1.0 is the class 1), but ``01`` with its zero."""
    numbers = None
    if _with_point(values) and not any(LEADING_ZERO.fullmatch(str(value)) for value in values):
        numbers = _numbers(values)
    if numbers is not None and all(
        math.isfinite(number) and number.is_integer() for number in numbers
    ):
        return [str(int(number)) for number in numbers]
    return [str(value) for value in values]


def _label_order(label: str) -> tuple[int, int, str]:
    """Integers by value, before any other names by spelling."""
    return (0, int(label), label) if INTEGER.fullmatch(label) else (1, 0, label)
