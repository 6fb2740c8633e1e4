"""Reading CoNLL files: a token and its columns a line, an empty line between sentences."""

from __future__ import annotations

from ..errors import UserError
from .guards import check_text
from .table import Table, decoded, named_rows

DOCUMENT = "-DOCSTART-"


def read_conll(path: str) -> Table:
    """A CoNLL file as sentences: ``tokens``, lists of what stands first in a line, and ``tags``, of what stands last.

    Columns are separated by tabs if the first token's are, else by spaces. Lines with ``-DOCSTART-`` are left out.

    Raises:
        UserError: a line has other columns than the first, or there is one column alone.
    """
    check_text(path)
    text, encoding = decoded(path)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    first = next((line for line in lines if line.strip() and not line.startswith(DOCUMENT)), "")
    separator = "\t" if "\t" in first else None
    width = len(first.split(separator))
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    starts: list[int] = []
    inside, documents, wrong = False, 0, []
    for number, line in enumerate(lines, 1):
        if line.startswith(DOCUMENT):
            documents += 1
            inside = False
            continue
        if not line.strip():
            inside = False
            continue
        parts = line.split(separator)
        if len(parts) != width or not all(part.strip() for part in (parts[0], parts[-1])):
            wrong.append(number)
            continue
        if not inside:
            tokens.append([])
            tags.append([])
            starts.append(number)
        inside = True
        tokens[-1].append(parts[0])
        tags[-1].append(parts[-1])
    if first and width < 2:
        raise UserError(
            f"{path} has one column; a CoNLL file has a token and its tag in every line"
        )
    if wrong:
        raise UserError(
            f"{path}: {named_rows(wrong, 'line')}: not the {width} columns that the first token has; correct the file"
        )
    notes = (f"lines with {DOCUMENT}: {documents}",) if documents else ()
    columns: dict[str, list] = {"tokens": tokens, "tags": tags}
    return Table(path, f"CoNLL, {width} columns{encoding}", columns, starts, notes=notes)
