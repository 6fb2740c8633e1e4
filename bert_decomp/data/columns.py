"""Which columns of a table hold the text: by the names that transformers and ``datasets`` use, else by their content.

A column's position never counts. Where two readings are possible the user is asked for ``text_column_names``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .table import Table

# Column names of transformers' examples, GLUE and sentence-transformers' data sets. A pair beats its own parts.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "answer"),
    ("question", "context"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("first", "second"),
)
SINGLES = ("text", "sentence", "review", "utterance")
CONVENTIONAL = {name for pair in PAIRS for name in pair} | set(SINGLES)
IDENTIFIERS = re.compile(
    r"(.*[_ -])?(id|idx|index|guid|uuid|key)|__index_level_\d+__|column \d+|unnamed: \d+",
    re.IGNORECASE,
)
NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
# A column name of more words than this is taken for an example: the file has no header.
MAX_NAME_WORDS = 4


def find_column(table: Table, name: str) -> str | None:
    """The column of this name, spelt exactly or, if that is unique, in other letters."""
    if name in table.columns:
        return name
    alike = [column for column in table.columns if column.casefold() == name.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def text_columns(
    table: Table, label_columns: Sequence[str], names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The one or two columns that hold the text.

    Args:
        label_columns: the columns of labels, which are no text.
        names: the columns that the user names, or None to choose.

    Raises:
        UserError: a named column is absent, no column can be text, or more than one choice is possible.
    """
    if names is not None:
        return _named(table, label_columns, names)
    others = [column for column in table.columns if column not in label_columns]
    kinds = {column: _kind_of(table.columns[column]) for column in others}
    usable = [column for column in others if kinds[column] in ("prose", "words", "numbers")]
    known = {column.casefold(): column for column in usable if column.casefold() in CONVENTIONAL}
    for pair in PAIRS:
        if set(pair) == set(known):
            return tuple(known[name] for name in pair)
    if len(known) == 1:
        return tuple(known.values())
    if len(known) > 1:
        raise _ambiguous(table, list(known.values()))
    if table.layout.startswith(("CSV", "TSV")):
        long = next((name for name in others if len(name.split()) > MAX_NAME_WORDS), None)
        if long is not None:
            raise UserError(
                f"{table.path}: the first line looks like an example ({long[:40]!r}), not like the names of columns; "
                "put a line with names, such as text and label, before it"
            )
    prose = [column for column in usable if kinds[column] == "prose"]
    words = [
        column
        for column in usable
        if kinds[column] == "words" and not IDENTIFIERS.fullmatch(column)
    ]
    if prose:
        choices = prose + [column for column in words if _may_be_text(table.columns[column])]
    else:
        choices = words or [
            column
            for column in usable
            if kinds[column] == "numbers" and not IDENTIFIERS.fullmatch(column)
        ]
    if len(choices) > 1:
        raise _ambiguous(table, choices)
    if not choices:
        raise UserError(
            f"{table.path}: one or two text columns are needed, but none of "
            f"{', '.join(table.columns)} holds text; name them with text_column_names"
        )
    return (choices[0],)


def unlabelled_columns(table: Table, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The one or two columns that hold the text, of a file in which labels may stand but do not count.

    Raises:
        UserError: as ``text_columns``.
    """
    label = find_column(table, "label")
    return text_columns(table, () if label is None else (label,), names)


def _named(table: Table, label_columns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    columns = [find_column(table, name) for name in names]
    found = tuple(column for column in columns if column is not None)
    if len(found) < len(names) or not 1 <= len(found) <= 2 or len(set(found)) < len(found):
        raise UserError(
            f"{table.path}: one or two text columns are needed, not {', '.join(names) or 'none'}; "
            f"text_column_names may name {', '.join(table.columns)}"
        )
    both = next((column for column in found if column in label_columns), None)
    if both is not None:
        raise UserError(f"{table.path}: the column {both!r} is named as text and as label")
    return found


def _ambiguous(table: Table, choices: list[str]) -> UserError:
    listed = ", ".join(map(repr, choices[:5]))
    return UserError(
        f"{table.path}: the text may be in any of the columns {listed}, or in two of them; say which with "
        f"text_column_names, such as {choices[0]} or {','.join(choices[:2])}"
    )


def _kind_of(values: list[Any]) -> str:
    """prose (texts with spaces), words (texts without), numbers, empty, or other (lists, dates ...)."""
    present = [value for value in values if value is not None and value != ""]
    if not present:
        return "empty"
    if all(isinstance(value, str) for value in present):
        if all(NUMBER.fullmatch(value) for value in present):
            return "numbers"
        return "prose" if any(" " in value.strip() for value in present) else "words"
    if any(isinstance(value, str) for value in present):
        return "words"  # a mixture, refused when its values are taken
    plain = all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in present
    )
    return "numbers" if plain else "other"


def _may_be_text(values: list[Any]) -> bool:
    """Whether single words may be text rather than codes (with digits) or categories (few, repeated)."""
    present = [str(value) for value in values if value is not None and value != ""]
    return 2 * len(set(present)) > len(present) and not all(
        any(character.isdigit() for character in value) for value in present
    )


def texts_of(table: Table, columns: Sequence[str]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The texts under the names ``text`` [, ``text_pair``], and notes on what is unusual about them.

    Numbers become text as they are written. A missing second text is an empty one, and counted.

    Raises:
        UserError: rows lack the first text, or hold something that is no text.
    """
    texts: dict[str, list[str]] = {}
    notes = []
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        values = table.columns[column]
        kind = _kind_of(values)
        wrong = [
            row
            for row, value in enumerate(values)
            if value is not None
            and not isinstance(value, str)
            and (kind != "numbers" or isinstance(value, bool))
        ]
        if wrong:
            raise UserError(
                f"{table.path}: {table.where(wrong)}: the column {column!r} holds no text "
                f"({type(values[wrong[0]]).__name__}); give text columns only"
            )
        # An empty field is all that CSV and TSV have for a missing value.
        typed = not table.layout.startswith(("CSV", "TSV"))
        missing = [
            row
            for row, value in enumerate(values)
            if value is None or (value == "" and not typed and name == "text")
        ]
        if missing and name == "text":
            raise UserError(
                f"{table.path} has rows without text or label ({table.where(missing)}: {column!r}); remove them"
            )
        strings = ["" if value is None else str(value) for value in values]
        try:
            "\n".join(strings).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{table.path}: the column {column!r} holds what is no character ({error.reason}); remove it"
            ) from error
        empty = [row for row, value in enumerate(strings) if not value.strip()]
        if empty:
            notes.append(f"empty texts in {column!r}: {len(empty)} ({table.where(empty)})")
        texts[name] = strings
    return texts, tuple(notes)
