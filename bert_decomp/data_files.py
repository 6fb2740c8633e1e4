"""Looking over data files before a library reads them: what would crash it, or unfold into far more than the file holds."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from .errors import UserError

# Compressed streams that could pass for text; others hold bytes that UTF-8 has not. datasets would unpack them.
PACKED = (b"BZh", b"\x04\x22\x4d\x18")
# The reader of JSON-lines recurses, and beyond some ten thousand levels its process dies.
DEEPEST = 64
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NO_BRACKET = bytes(sign for sign in range(256) if sign not in b"[]{}")
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# Bytes, and rows, that a Parquet file may unfold to for each of its own bytes, beside the first few.
UNFOLDING, ALWAYS_FINE = 100, 2**20


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
                    raise UserError(f"{path} is no text file (a compressed one must be unpacked first)")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error


def check_json(path: str) -> None:
    """Raise UserError unless the file is text whose lists and objects are not nested absurdly deep."""
    check_text(path)
    depth = 0
    with Path(path).open("rb") as file:
        for line in file:
            brackets = STRING.sub(b"", line).translate(None, NO_BRACKET)
            deepest = max(accumulate((STEP[sign] for sign in brackets), initial=depth))
            depth = max(depth + sum(STEP[sign] for sign in brackets), 0)
            if deepest > DEEPEST:
                raise UserError(f"{path} is nested deeper than {DEEPEST} levels; give one flat object a line")


def check_parquet(path: str) -> None:
    """Raise UserError for a file that is no Parquet, or says that it unfolds to absurdly many rows or bytes."""
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(path)
        groups = [about.row_group(index) for index in range(about.num_row_groups)]
        bytes_ = sum(group.total_byte_size for group in groups)
    except Exception as error:
        raise UserError(f"{path} cannot be read as parquet: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    most = ALWAYS_FINE + UNFOLDING * Path(path).stat().st_size
    if not 0 <= bytes_ <= most or not 0 <= about.num_rows <= most:
        raise UserError(f"{path} says that it unfolds to {about.num_rows} rows in {bytes_} bytes, which it cannot hold")


CHECKS: dict[str, Callable[[str], None]] = {"csv": check_text, "json": check_json, "parquet": check_parquet}
