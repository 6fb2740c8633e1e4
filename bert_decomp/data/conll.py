"""Reading CoNLL files: a token and its columns a line, an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..errors import UserError
from .guards import check_text
from .pieces import Piece, lines_of
from .table import Table, decoded, named_rows

DOCUMENT = "-DOCSTART-"


class _Sentences:
    """The sentences of a file's lines as (number of the first line, its tokens' columns), and what was seen beside.

    Columns are separated by tabs if the first token's are, else by spaces. Lines with ``-DOCSTART-`` are left out.

    Attributes:
        width: columns of the first token; 0 before it.
        documents: lines with ``-DOCSTART-``.
        wrong: lines that have other columns than the first token.
    """

    def __init__(self, lines: Iterable[str]):
        self.lines = lines
        self.width = self.documents = 0
        self.wrong: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, list[list[str]]]]:
        separator: str | None = None
        start = 0
        rows: list[list[str]] = []
        for number, line in enumerate(self.lines, 1):
            self.documents += line.startswith(DOCUMENT)
            if line.startswith(DOCUMENT) or not line.strip():
                if rows:
                    yield start, rows
                rows = []
                continue
            if not self.width:
                separator = "\t" if "\t" in line else None
                self.width = len(line.split(separator))
            parts = line.rstrip("\r\n").split(separator)
            if len(parts) != self.width or not all(part.strip() for part in (parts[0], parts[-1])):
                self.wrong.append(number)
                continue
            start = start if rows else number
            rows.append(parts)
        if rows:
            yield start, rows

    def error(self, path: str) -> UserError:
        """What to say of the wrong lines."""
        return UserError(
            f"{path}: {named_rows(self.wrong, 'line')}: not the {self.width} columns that the first token has; correct "
            "the file"
        )


def _table(path: str, found: Sequence[tuple[int, list[list[str]]]], layout: str) -> Table:
    columns: dict[str, list] = {
        name: [[row[place] for row in rows] for _, rows in found]
        for name, place in (("tokens", 0), ("tags", -1))
    }
    return Table(path, layout, columns, [start for start, _ in found])


def read_conll(path: str) -> Table:
    """A CoNLL file as sentences: ``tokens``, lists of what stands first in a line, and ``tags``, of what stands last.

    Raises:
        UserError: a line has other columns than the first, or there is one column alone.
    """
    check_text(path)
    text, encoding = decoded(path)
    source = _Sentences(text.split("\n"))
    found = list(source)
    if source.width == 1:
        raise UserError(
            f"{path} has one column; a CoNLL file has a token and its tag in every line"
        )
    if source.wrong:
        raise source.error(path)
    table = _table(path, found, f"CoNLL, {source.width} columns{encoding}")
    notes = (f"lines with {DOCUMENT}: {source.documents}",) if source.documents else ()
    return replace(table, notes=notes)


def conll_pieces(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """The tokens of a CoNLL file in UTF-8, ``rows`` sentences or ``size`` bytes at a time; tags may be absent.

    Raises:
        UserError: a line has other columns than the first.
    """
    source = _Sentences(line for _, line in lines_of(path))
    held: list[tuple[int, list[list[str]]]] = []
    filled = 0

    def piece() -> Piece:
        table = _table(path, held, "CoNLL")
        kept = ("tokens", "tags")[: source.width] if names is None else names
        return Piece(replace(table, columns={name: table.columns[name] for name in kept}))

    for sentence in source:
        if source.wrong:
            raise source.error(path)
        held.append(sentence)
        filled += sum(len(part) for parts in sentence[1] for part in parts)
        if len(held) == rows or filled >= size:
            yield piece()
            held, filled = [], 0
    if source.wrong:
        raise source.error(path)
    if held:
        yield piece()
