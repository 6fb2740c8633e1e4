"""Looking over data files before a library reads them: what would crash it, or unfold into far more than the file holds."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from ..errors import UserError

# Compressed streams that could pass for text; others hold bytes that UTF-8 has not. datasets would unpack them.
PACKED = (b"BZh", b"\x04\x22\x4d\x18")
# Of a table with one example a row; each column costs its reader milliseconds.
MOST_COLUMNS, LONGEST_HEAD = 1000, 2**16
# The reader of JSON-lines recurses, and beyond some ten thousand levels its process dies.
DEEPEST = 64
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NO_BRACKET = bytes(sign for sign in range(256) if sign not in b"[]{}")
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# Bytes, and rows, that a Parquet file may unfold to for each of its own bytes, and how many it may have in any case.
UNFOLDING, FINE_BYTES = 100, 2**20
ROWS_A_BYTE, FINE_ROWS = 8, 2**16


def check_text(path: str) -> None:
    """Raise UserError unless the file is UTF-8 without NUL bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with Path(path).open("rb") as file:
        packed = file.read(4).startswith(PACKED)
        file.seek(0)
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
                if packed or b"\0" in block:
                    raise UserError(
                        f"{path} is no text file (a compressed one must be unpacked first)"
                    )
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not text in UTF-8 ({error.reason}); save it as UTF-8"
            ) from error


def check_csv(path: str) -> None:
    """Raise UserError unless the file is text whose first line is that of a table, whose every name costs time."""
    check_text(path)
    with Path(path).open("rb") as file:
        head = file.readline(LONGEST_HEAD + 1)
    if len(head) > LONGEST_HEAD or max(head.count(b","), head.count(b"\t")) >= MOST_COLUMNS:
        raise UserError(f"{path} begins with no line of at most {MOST_COLUMNS} column names")


def check_json(path: str) -> None:
    """Raise UserError unless the file is text whose lists and objects are not nested absurdly deep."""
    check_text(path)
    depth = 0
    with Path(path).open("rb") as file:
        for line in file:
            if line.count(b'":') > MOST_COLUMNS and not line.lstrip().startswith(b"["):
                raise UserError(
                    f"{path} has more than {MOST_COLUMNS} names in a line; give one flat object a line"
                )
            brackets = STRING.sub(b"", line).translate(None, NO_BRACKET)
            deepest = max(accumulate((STEP[sign] for sign in brackets), initial=depth))
            depth = max(depth + sum(STEP[sign] for sign in brackets), 0)
            if deepest > DEEPEST:
                raise UserError(
                    f"{path} is nested deeper than {DEEPEST} levels; give one flat object a line"
                )


def check_parquet(path: str) -> None:
    """Raise UserError for a file that is no Parquet, or says that it unfolds to absurdly many rows or bytes."""
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(path)
        groups = [about.row_group(index) for index in range(about.num_row_groups)]
        bytes_ = sum(group.total_byte_size for group in groups)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as parquet: {reason}") from error
    size = Path(path).stat().st_size
    if (
        about.num_columns > MOST_COLUMNS
        or not 0 <= bytes_ <= FINE_BYTES + UNFOLDING * size
        or not 0 <= about.num_rows <= FINE_ROWS + ROWS_A_BYTE * size
    ):
        raise UserError(
            f"{path} says that it unfolds to {about.num_rows} rows of {about.num_columns} columns in "
            f"{bytes_} bytes, which it cannot hold"
        )


CHECKS: dict[str, Callable[[str], None]] = {
    "csv": check_csv,
    "json": check_json,
    "parquet": check_parquet,
}
