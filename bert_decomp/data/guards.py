"""Checks before a data file is read: what would crash its reader, or unfold into far more than the file holds."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from ..errors import UserError

# Compressed streams that could pass for text; others hold bytes that UTF-8 has not.
PACKED = (b"BZh", b"\x04\x22\x4d\x18")
# Of a table with one example a row; each column costs its reader milliseconds.
MAX_COLUMNS, MAX_HEAD = 1000, 2**16
# The reader of JSON-lines recurses, and beyond some ten thousand levels its process dies.
MAX_DEPTH = 64
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NO_BRACKET = bytes(character for character in range(256) if character not in b"[]{}")
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# Bytes, and rows, that a Parquet file may unfold to for each of its own bytes, and how many it may have in any case.
UNFOLDING, FINE_BYTES = 100, 2**20
ROWS_A_BYTE, FINE_ROWS = 8, 2**16


def encoding_of(path: str) -> str:
    """The encoding that a text file's byte order mark names; UTF-8 without one."""
    with Path(path).open("rb") as file:
        head = file.read(4)
    # The mark of UTF-32 begins with that of UTF-16.
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            return encoding
    return "utf-8"


def check_text(path: str) -> None:
    """Raise UserError unless the file is text in its encoding, without NUL characters."""
    encoding = encoding_of(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = 1
    with Path(path).open("rb") as file:
        packed = file.read(4).startswith(PACKED)
        file.seek(0)
        try:
            while block := file.read(1 << 20):
                text = decoder.decode(block)
                if packed or "\0" in text:
                    raise UserError(
                        f"{path} is no text file (a compressed one must be unpacked first, and UTF-16 needs its byte "
                        "order mark)"
                    )
                lines += text.count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            valid = error.object[: error.start].decode(encoding, "ignore")
            raise UserError(
                f"{path} is not text in {encoding.upper().removesuffix('-SIG')} ({error.reason} in line "
                f"{lines + valid.count(chr(10))}); save it as UTF-8"
            ) from error


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a checked text file as UTF-8."""
    encoding = encoding_of(path)
    if encoding.startswith("utf-8"):
        with Path(path).open("rb") as file:
            yield from file
    else:
        with Path(path).open(encoding=encoding, newline="\n") as text:
            yield from (line.encode("utf-8", "surrogatepass") for line in text)


def check_csv(path: str) -> None:
    """Raise UserError unless the file is text whose first line is that of a table, whose every name costs time."""
    check_text(path)
    encoding = encoding_of(path)
    with Path(path).open(encoding=encoding, newline="\n") as file:
        head = file.readline(MAX_HEAD + 1)
    if len(head) > MAX_HEAD or max(map(head.count, ",;\t|")) >= MAX_COLUMNS:
        raise UserError(f"{path} begins with no line of at most {MAX_COLUMNS} column names")


def check_json(path: str, flat: bool = True) -> None:
    """Raise UserError unless the file is text whose lists and objects are not nested absurdly deep.

    Args:
        flat: an object is one example, and may not have absurdly many names.
    """
    check_text(path)
    depth = 0
    for line in _lines(path):
        if flat and line.count(b'":') > MAX_COLUMNS and not line.lstrip().startswith(b"["):
            raise UserError(
                f"{path} has more than {MAX_COLUMNS} names in a line; give one flat object a line"
            )
        brackets = STRING.sub(b"", line).translate(None, NO_BRACKET)
        deepest = max(accumulate((STEP[character] for character in brackets), initial=depth))
        depth = max(depth + sum(STEP[character] for character in brackets), 0)
        if deepest > MAX_DEPTH:
            raise UserError(
                f"{path} is nested deeper than {MAX_DEPTH} levels; give one flat object a line"
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
        about.num_columns > MAX_COLUMNS
        or not 0 <= bytes_ <= FINE_BYTES + UNFOLDING * size
        or not 0 <= about.num_rows <= FINE_ROWS + ROWS_A_BYTE * size
    ):
        raise UserError(
            f"{path} says that it unfolds to {about.num_rows} rows of {about.num_columns} columns in "
            f"{bytes_} bytes, which it cannot hold"
        )
