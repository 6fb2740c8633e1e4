"""Consecutive rows of a file, and those of CSV and JSON-lines files, read in bounded memory."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .delimited import DELIMITERS, delimiter_of, fields_of_any_length
from .guards import check_csv
from .table import Table, check_names

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes of the longest row of a text file.
LONGEST_ROW = 16 * 2**20
# Bytes at the beginning of a CSV file that decide on its delimiter.
HEAD = 2**18


@dataclass(frozen=True)
class Piece:
    """Rows as plain values, and as pyarrow's columns where the file has typed ones."""

    table: Table
    typed: pa.Table | None = None

    def arrow(self, names: Sequence[str]) -> pa.Table:
        """Columns as a pyarrow table; types of a text file are those of its values."""
        import pyarrow as pa

        if self.typed is not None:
            return self.typed.select(list(names))
        return pa.table({name: pa.array(self.table.columns[name]) for name in names})


def lines_of(path: str) -> Iterator[tuple[bytes, str]]:
    """The lines of a UTF-8 file, as bytes and as text, without its byte order mark."""
    with Path(path).open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_ROW + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > LONGEST_ROW:
                raise UserError(
                    f"{path}: line {number} has more than {LONGEST_ROW} bytes; give one example a line"
                )
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not text in UTF-8 ({error.reason} in line {number}); save it as UTF-8"
                ) from error
            if "\0" in text:
                raise UserError(f"{path} is no text file: line {number} has a NUL character")
            yield raw, text


class _Rows:
    """CSV rows as (line, bytes, fields), and where the reader is, for messages."""

    def __init__(self, path: str, delimiter: str, skip: int):
        self.path, self.delimiter, self.skip = path, delimiter, skip
        self.size = self.start = 0

    def _watched(self) -> Iterator[str]:
        for number, (raw, text) in enumerate(lines_of(self.path), 1):
            if number <= self.skip:
                continue
            self.size += len(raw)
            if self.size > LONGEST_ROW:
                raise UserError(
                    f"{self.path}: the row that begins at line {self.start} has more than {LONGEST_ROW} bytes; "
                    "a quote may be left open there"
                )
            yield text

    def __iter__(self) -> Iterator[tuple[int, int, list[str]]]:
        reader = csv.reader(self._watched(), delimiter=self.delimiter, strict=True)
        self.start = self.skip + 1
        with fields_of_any_length():
            while True:
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    reason = str(error).partition(" - ")[0]
                    raise UserError(
                        f"{self.path} cannot be read as csv: {reason} in the row that begins at line {self.start}; "
                        "double the quotes that belong to a field"
                    ) from error
                if fields is None:
                    return
                yield self.start, self.size, fields
                self.size, self.start = 0, self.skip + reader.line_num + 1


def _head(path: str) -> str:
    """The first whole rows of a CSV file: cut at a line's end where no quote is open."""
    with Path(path).open("rb") as file:
        raw = file.read(HEAD)
        whole = not file.read(1)
    if not whole:
        end = len(raw)
        while (end := raw.rfind(b"\n", 0, end)) > 0 and raw.count(b'"', 0, end) % 2:
            pass
        raw = raw[: end + 1] if end > 0 else raw
    return raw.decode("utf-8-sig", "replace")


def csv_pieces(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """A CSV file in UTF-8, ``rows`` rows or ``size`` bytes at a time, with the columns ``names``, or all.

    Raises:
        UserError: it is no CSV, or a row does not fit the header.
    """
    check_csv(path)
    head = _head(path)
    hint = re.match(r"sep=(.)\r?\n", head)
    source = _Rows(path, hint[1] if hint else delimiter_of(path, head), skip=1 if hint else 0)
    layout = f"CSV with {DELIMITERS.get(source.delimiter, repr(source.delimiter))}"
    header: list[str] | None = None
    lines: list[int] = []
    fields_of: list[list[str]] = []
    filled = 0

    def piece(header: list[str]) -> Piece:
        wanted = header if names is None else names
        places = [header.index(name) for name in wanted]
        columns = {
            name: [fields[place] for fields in fields_of]
            for name, place in zip(wanted, places, strict=True)
        }
        return Piece(Table(path, layout, columns, lines))

    for line, length, fields in source:
        if header is None:
            header = [name.strip() or f"column {place}" for place, name in enumerate(fields, 1)]
            check_names(path, header)
            continue
        if not fields and len(header) > 1:
            continue
        if not fields:
            raise UserError(f"{path}: line {line}: no text; remove blank lines")
        if len(fields) != len(header):
            raise UserError(
                f"{path}: line {line} has {len(fields)} field{'s' if len(fields) != 1 else ''} where the header has "
                f"{len(header)} ({layout}); quote fields that contain the delimiter"
            )
        lines.append(line)
        fields_of.append(fields)
        filled += length
        if len(lines) == rows or filled >= size:
            yield piece(header)
            lines, fields_of, filled = [], [], 0
    if lines and header is not None:
        yield piece(header)


def json_pieces(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """A file with one JSON object a line, ``rows`` rows or ``size`` bytes at a time.

    Every piece has the columns ``names``, or those of the first piece.

    Raises:
        UserError: a line is no object.
    """
    from lowrank_kernels.strict_json import unique_keys

    wanted = list(names or ())
    values: list[dict[str, Any]] = []
    lines: list[int] = []
    filled = 0

    def piece() -> Piece:
        if not wanted:
            wanted.extend(dict.fromkeys(name for value in values for name in value))
        columns = {name: [value.get(name) for value in values] for name in wanted}
        return Piece(Table(path, "JSON-lines", columns, lines))

    for number, (raw, text) in enumerate(lines_of(path), 1):
        if not text.strip():
            continue
        if number == 1 and text.lstrip().startswith("["):
            raise UserError(
                f"{path} is one JSON list, which cannot be read in parts; give JSON-lines"
            )
        try:
            value = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read as JSON-lines: line {number}: {error}"
            ) from error
        if not isinstance(value, dict):
            raise UserError(
                f"{path} cannot be read as JSON-lines: line {number} is no object; give one flat object a line"
            )
        values.append(value)
        lines.append(number)
        filled += len(raw)
        if len(lines) == rows or filled >= size:
            yield piece()
            values, lines, filled = [], [], 0
    if lines:
        yield piece()
