"""Reading CSV and TSV, strictly: CSV has quoting, TSV has none.

CSV goes through the strict reader of the standard library: those of pandas and pyarrow fill short rows, repair stray
quotes or infer types without a word.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UserError
from .guards import check_csv
from .table import Table, check_names, decoded, named_rows

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class _Rows:
    """Fields of each row that is no blank line, and the line where it begins; the first row is the header."""

    fields: list[list[str]]
    lines: list[int]
    blank: list[int]
    mixed_ends: bool

    def fit(self) -> bool:
        """Whether every row has as many fields as the header, but for a trailing delimiter."""
        return len({len(row) for row in _without_trailing(self)[0].fields}) == 1


@contextmanager
def fields_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _lines(text: str) -> Iterator[str]:
    """The lines with their ends, one at a time: a ``StringIO`` would take four bytes a character.

    A lone carriage return ends a line only where no line ends otherwise.
    """
    end = "\n" if "\n" in text else "\r"
    start = 0
    while start < len(text):
        stop = text.find(end, start) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _parse(text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> _Rows:
    """Split text into rows and fields; raises csv.Error, with the line, where the quotes are wrong."""
    lines = _lines(text)
    ends: set[bool] = set()
    latest = ""

    def watched() -> Iterator[str]:
        nonlocal latest
        for latest in lines:  # noqa: UP028 - ``latest`` is read outside, which ``yield from`` would not set
            yield latest

    reader = csv.reader(watched(), delimiter=delimiter, quoting=quoting, strict=True)
    fields_of, starts, blank = [], [], []
    start = 1
    with fields_of_any_length():
        try:
            for fields in reader:
                if fields:
                    fields_of.append(fields)
                    starts.append(start)
                else:
                    blank.append(start)
                if latest.endswith("\n"):
                    ends.add(latest.endswith("\r\n"))
                start = reader.line_num + 1
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            raise csv.Error(f"{reason} in the row that begins at line {start}") from error
    return _Rows(fields_of, starts, blank, mixed_ends=len(ends) > 1)


def _try_parse(
    text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> _Rows | None:
    try:
        rows = _parse(text, delimiter, quoting)
    except csv.Error:
        return None
    return rows if rows.fields and rows.fit() else None


def _without_trailing(rows: _Rows) -> tuple[_Rows, bool]:
    """The rows without an empty last field that the header alone, or every row but the header, has."""
    header, *others = rows.fields
    count = len(header)
    # Under one name alone, a delimiter may as well belong to the text.
    if others and count > 1 and all(len(row) == count + 1 and row[-1] == "" for row in others):
        return replace(rows, fields=[header, *(row[:-1] for row in others)]), True
    if header[-1] == "" and others and all(len(row) == count - 1 for row in others):
        return replace(rows, fields=[header[:-1], *others]), True
    return rows, False


def read_csv(path: str) -> Table:
    """A CSV file.

    Raises:
        UserError: it is no CSV, or a row does not fit the header.
    """
    check_csv(path)
    text, encoding = decoded(path)
    # Excel's own way to name the delimiter, in a line before the header.
    hint = re.match(r"sep=(.)\r?\n", text)
    delimiter = hint[1] if hint else delimiter_of(path, text)
    try:
        rows = _parse(text, delimiter)
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read as csv: {error}; double the quotes that belong to a field"
        ) from error
    if hint:
        rows = replace(rows, fields=rows.fields[1:], lines=rows.lines[1:])
    kind = f"CSV with {DELIMITERS.get(delimiter, repr(delimiter))}"
    return _tabulate(path, kind + encoding, rows)


def delimiter_of(path: str, text: str) -> str:
    """The one delimiter that splits the header and fits the rows."""
    head = next(_lines(text), "")
    splitting = [
        sign
        for sign in DELIMITERS
        if sign in head and (rows := _try_parse(head, sign)) and len(rows.fields[0]) > 1
    ]
    if not splitting and any(sign in head for sign in DELIMITERS):
        # Quoted names may go on over the line's end: the rows decide.
        splitting = [sign for sign in DELIMITERS if sign in head]
    fitting = splitting if len(splitting) < 2 else [s for s in splitting if _try_parse(text, s)]
    if len(fitting) > 1 or (splitting and not fitting):
        choices = " or ".join(DELIMITERS[sign] for sign in splitting)
        raise UserError(
            f"{path}: the fields may be separated by {choices}, and "
            f"{'both fit' if fitting else 'neither fits'} every row; quote the fields that contain the other sign, "
            "or give JSON-lines or Parquet"
        )
    return fitting[0] if fitting else ","


def read_tsv(path: str) -> Table:
    """A TSV file.

    Raises:
        UserError: there are two ways to read it, or a row does not fit the header.
    """
    check_csv(path)
    text, encoding = decoded(path)
    plain = _try_parse(text, "\t", csv.QUOTE_NONE)
    quoted = _try_parse(text, "\t") if '"' in text else None
    kind = "TSV"
    if quoted is not None and (plain is None or _header_is_quoted(plain)):
        plain, kind = quoted, "TSV with quoted fields"
    elif quoted is not None and plain is not None and (row := _quoted_row(plain, quoted)):
        raise UserError(
            f"{path}: the quotes in line {row} may belong to the text, or be a spreadsheet's around it; in the second "
            "case rename the file to .csv (which may have tabs between fields), in the first give JSON-lines or Parquet"
        )
    if plain is None:
        try:
            plain = _parse(text, "\t", csv.QUOTE_NONE)
        except csv.Error as error:
            raise UserError(f"{path} cannot be read as tsv: {error}") from error
    return _tabulate(path, kind + encoding, plain)


def _header_is_quoted(rows: _Rows) -> bool:
    return all(len(name) > 1 and name[0] == name[-1] == '"' for name in rows.fields[0])


def _quoted_row(plain: _Rows, quoted: _Rows) -> int | None:
    """The line of a field that a quoting program seems to have written: quotes around a quote, a tab or nothing."""
    if len(plain.fields) != len(quoted.fields):
        return next(
            line
            for row, line in zip(quoted.fields, quoted.lines, strict=True)
            if any("\n" in value for value in row)
        )
    for before, after, line in zip(plain.fields, quoted.fields, plain.lines, strict=True):
        for one, other in zip(before, after, strict=False):
            if one != other and (not other or any(sign in other for sign in '"\t\r\n')):
                return line
    return None


def _tabulate(path: str, layout: str, rows: _Rows) -> Table:
    """Rows as columns under the header's names; raises UserError where a row does not fit."""
    if not rows.fields:
        raise UserError(f"{path} holds no examples; give a file with examples")
    notes: tuple[str, ...] = ()
    rows, trailing = _without_trailing(rows)
    header, *fields = rows.fields
    header, lines = [name.strip() for name in header], rows.lines[1:]
    wrong = [line for row, line in zip(fields, lines, strict=True) if len(row) != len(header)]
    if wrong:
        count = len(next(row for row in fields if len(row) != len(header)))
        others = f", and so do {named_rows(wrong[1:], 'line')}" if len(wrong) > 1 else ""
        advice = (
            "quote fields that contain the delimiter" if layout.startswith("CSV") else "remove it"
        )
        raise UserError(
            f"{path}: line {wrong[0]} has {count} field{'s' if count != 1 else ''} where the header has {len(header)} "
            f"({layout}){others}; {advice}"
        )
    if trailing:
        notes += ("a delimiter at the end of each row is ignored",)
    if rows.mixed_ends:
        notes += (
            "lines end in two ways, with and without a carriage return, which is no part of a field",
        )
    last = rows.lines[-1]
    inner = [line for line in rows.blank if line < last]
    if inner and len(header) == 1:
        raise UserError(f"{path}: {named_rows(inner, 'line')}: no text; remove blank lines")
    if inner:
        notes += (f"blank lines hold no example: {named_rows(inner, 'line')}",)
    spanning = [
        line
        for row, line in zip(fields, lines, strict=True)
        if any("\n" in value or "\r" in value for value in row)
    ]
    if spanning:
        notes += (f"fields over several lines: {named_rows(spanning, 'line')}",)
    by_column: list[list[str]] = (
        [list(column) for column in zip(*fields, strict=True)] if fields else [[] for _ in header]
    )
    for index in reversed(range(len(header))):
        if header[index] == "" and not any(by_column[index]):
            del header[index], by_column[index]
            notes += (f"column {index + 1} has no name and no values and is ignored",)
        elif header[index] == "":
            header[index] = f"column {index + 1}"
    check_names(path, header)
    return Table(path, layout, dict(zip(header, by_column, strict=True)), lines, notes=notes)
