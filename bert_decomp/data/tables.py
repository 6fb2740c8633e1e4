"""Reading files of rows as they were written: CSV, TSV, JSON-lines and Parquet.

Nothing is dropped, merged or retyped here: a row that does not fit is named by its line, and the values of CSV and TSV
files stay strings, because only the labels' meaning can say whether ``01`` is a number and ``NA`` a missing value.
That is why CSV goes through the strict reader of the standard library: those of pandas and pyarrow fill short rows,
repair stray quotes or infer types without a word. CSV has quoting, TSV has none.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..io.json import check_file
from .guards import MAX_COLUMNS, check_csv, check_json, check_parquet, encoding_of

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Lines or rows that a message names; further ones are only counted.
NAMED_ROWS = 5


@dataclass(frozen=True)
class Table:
    """The rows of one file, by column.

    Attributes:
        path: the file.
        layout: how it was read, in words, such as "CSV with semicolons, UTF-16".
        columns: values of each column; strings for CSV and TSV, plain Python values else. None is a missing value.
        lines: the line at which each row begins, or None if rows are counted instead, from 1.
        class_names: names of the classes of integer columns, where ``datasets`` wrote them into the file.
        notes: what a reader should know of how the file was read.
    """

    path: str
    layout: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, rows: Sequence[int]) -> str:
        """Name rows (numbers from 0) as a user counts them: "line 3", or "lines 3, 7, 8 and 4 more"."""
        return named_rows(
            [self.lines[row] if self.lines is not None else row + 1 for row in rows],
            "row" if self.lines is None else "line",
        )


def named_rows(numbers: Sequence[int], word: str) -> str:
    """The first few of these numbers in words, such as "lines 3, 7, 8 and 4 more"."""
    listed = ", ".join(map(str, numbers[:NAMED_ROWS]))
    more = f" and {len(numbers) - NAMED_ROWS} more" if len(numbers) > NAMED_ROWS else ""
    return f"{word}{'s' if len(numbers) > 1 else ''} {listed}{more}"


def read_table(path: str) -> Table:
    """Read a file of rows by its ending: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet``.

    Raises:
        UserError: the file is absent, empty, damaged or of an unknown kind, a row does not fit the header, or there are
            two ways to read it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f"{path}: cannot read files ending in {suffix!r}; use one of {', '.join(READERS)}"
        )
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if check_file(path).stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with examples")
    try:
        table = READERS[suffix](path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(table) == 0:
        raise UserError(f"{path} holds no examples; give a file with examples")
    return table


def _decoded(path: str) -> tuple[str, str]:
    """The text of a checked file without its byte order mark, and its encoding in words ("" for UTF-8)."""
    encoding = encoding_of(path)
    word = "" if encoding.startswith("utf-8") else f", {encoding.upper()}"
    return Path(path).read_bytes().decode(encoding), word


# CSV and TSV.


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
def _fields_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parse(text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> _Rows:
    """Split text into rows and fields; raises csv.Error, with the line, where the quotes are wrong."""
    # A lone carriage return ends a line only where no line ends otherwise.
    lines = io.StringIO(text, newline="\n" if "\n" in text else "")
    ends: set[bool] = set()
    latest = ""

    def watched() -> Iterator[str]:
        nonlocal latest
        for latest in lines:  # noqa: UP028 - ``latest`` is read outside, which ``yield from`` would not set
            yield latest

    reader = csv.reader(watched(), delimiter=delimiter, quoting=quoting, strict=True)
    fields_of, starts, blank = [], [], []
    start = 1
    with _fields_of_any_length():
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


def _read_csv(path: str) -> Table:
    check_csv(path)
    text, encoding = _decoded(path)
    # Excel's own way to name the delimiter, in a line before the header.
    hint = re.match(r"sep=(.)\r?\n", text)
    delimiter = hint[1] if hint else _delimiter(path, text)
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


def _delimiter(path: str, text: str) -> str:
    """The one delimiter that splits the header and fits the rows."""
    head = io.StringIO(text).readline()
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


def _read_tsv(path: str) -> Table:
    check_csv(path)
    text, encoding = _decoded(path)
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
    _check_names(path, header)
    return Table(path, layout, dict(zip(header, by_column, strict=True)), lines, notes=notes)


def _check_names(path: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns named {twice[0]!r}; rename one")


# JSON and Parquet.


def _read_json(path: str) -> Table:
    from lowrank_kernels.strict_json import unique_keys

    check_json(path)
    text, encoding = _decoded(path)
    kind = Path(path).suffix.lower()[1:]

    def parse(part: str, place: str) -> Any:
        try:
            return json.loads(part, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as {kind}: {place}{error}") from error

    lines: list[int] | None = None
    if text.lstrip().startswith("["):
        values, layout = parse(text, ""), "JSON list"
    else:
        numbered = [
            (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        values = [parse(line, f"line {number}: ") for number, line in numbered]
        lines, layout = [number for number, _ in numbered], "JSON-lines"
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            place = f"line {lines[index]}" if lines else f"item {index + 1}"
            raise UserError(
                f"{path} cannot be read as {kind}: {place} is no object; give one flat object a line"
            )
    if len(values) == 1 and all(isinstance(part, (dict, list)) for part in values[0].values()):
        raise UserError(
            f"{path} cannot be read as {kind}: it holds one object of lists or objects; give one flat object a line "
            "(pandas: to_json(orient='records', lines=True))"
        )
    names = list(dict.fromkeys(name for value in values for name in value))
    if len(names) > MAX_COLUMNS:
        raise UserError(
            f"{path} has more than {MAX_COLUMNS} names; give one flat object a line, all with the same names"
        )
    return Table(
        path,
        layout + encoding,
        {name: [value.get(name) for value in values] for name in names},
        lines,
    )


def _read_parquet(path: str) -> Table:
    import pyarrow.parquet

    check_parquet(path)
    try:
        data = pyarrow.parquet.ParquetFile(path).read()
        columns = [column.to_pylist() for column in data.columns]
        metadata = json.loads((data.schema.metadata or {}).get(b"huggingface", b"{}"))
    except Exception as error:  # whatever the reader makes of a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as parquet: {reason}") from error
    _check_names(path, data.column_names)
    return Table(
        path,
        "Parquet",
        dict(zip(data.column_names, columns, strict=True)),
        class_names=_class_names(metadata),
    )


def _class_names(metadata: Any) -> dict[str, tuple[str, ...]]:
    """The names of ``ClassLabel`` columns, which ``datasets`` writes beside the schema."""
    try:
        features = metadata["info"]["features"]
        return {
            column: tuple(feature["names"])
            for column, feature in features.items()
            if feature["_type"] == "ClassLabel"
            and all(isinstance(n, str) for n in feature["names"])
        }
    except (KeyError, TypeError, AttributeError):
        return {}


READERS: dict[str, Callable[[str], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
