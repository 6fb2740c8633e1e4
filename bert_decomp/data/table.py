"""``Table``: the rows of one file by column, and what its readers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .guards import encoding_of

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
        first: number of the first row, where rows are counted and these are a part of the file's.
    """

    path: str
    layout: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    first: int = 1

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, rows: Sequence[int]) -> str:
        """Name rows (numbers from 0) as a user counts them: "line 3", or "lines 3, 7, 8 and 4 more"."""
        return named_rows(
            [self.lines[row] if self.lines is not None else row + self.first for row in rows],
            "row" if self.lines is None else "line",
        )


def named_rows(numbers: Sequence[int | str], word: str) -> str:
    """The first few of these numbers in words, such as "lines 3, 7, 8 and 4 more"."""
    listed = ", ".join(map(str, numbers[:NAMED_ROWS]))
    more = f" and {len(numbers) - NAMED_ROWS} more" if len(numbers) > NAMED_ROWS else ""
    return f"{word}{'s' if len(numbers) > 1 else ''} {listed}{more}"


def decoded(path: str) -> tuple[str, str]:
    """The text of a checked file without its byte order mark, and its encoding in words ("" for UTF-8)."""
    encoding = encoding_of(path)
    word = "" if encoding.startswith("utf-8") else f", {encoding.upper()}"
    return Path(path).read_bytes().decode(encoding), word


def check_names(path: str, names: list[str]) -> None:
    """Raise UserError if two columns have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns named {twice[0]!r}; rename one")
