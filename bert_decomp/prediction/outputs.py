"""The file of a job's answers: Parquet or JSON-lines, and by what the same job knows it again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..io.json import read_json, write_json
from ..io.manifest import digest_of

if TYPE_CHECKING:
    import pyarrow as pa

# Key of the job's fingerprint in the metadata of every Parquet file.
KEY = b"lowrank_bert.job"
# Rows, or bytes, of a row group of Parquet.
GROUP_ROWS, GROUP_BYTES = 2**17, 2**26


@dataclass(frozen=True)
class Format:
    """A format of the output.

    Attributes:
        rows: (path, fingerprint) -> how many rows the file has if the job wrote it, else None.
        write: (path, temporary, tables, fingerprint), writes to ``temporary`` what is renamed to ``path``.
    """

    rows: Callable[[Path, str], int | None]
    write: Callable[[Path, Path, Iterator[pa.Table], str], None]


def rows_of_parquet(path: Path, fingerprint: str) -> int | None:
    """Rows of a whole Parquet file of the job; None for any other file."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(path)
    except (OSError, pa.ArrowException):
        return None
    return about.num_rows if (about.metadata or {}).get(KEY) == fingerprint.encode() else None


def _write_parquet(
    _path: Path, temporary: Path, tables: Iterator[pa.Table], _fingerprint: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    held: list[pa.Table] = []
    writer = None
    try:
        for table in tables:
            held.append(table)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(temporary, table.schema)
            if sum(map(len, held)) >= GROUP_ROWS or sum(t.nbytes for t in held) >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held = []
        if held and writer is not None:
            writer.write_table(pa.concat_tables(held).combine_chunks())
    finally:
        if writer is not None:
            writer.close()


def record_of(path: Path) -> Path:
    """The file beside JSON-lines, in which there is no place for a fingerprint, that holds it."""
    return path.with_name(f"{path.name}.job")


def _rows_of_lines(path: Path, fingerprint: str) -> int | None:
    record = record_of(path)
    about = read_json(record) if record.is_file() else None
    if not isinstance(about, dict) or about.get("job") != fingerprint:
        return None
    return about["rows"] if about.get("sha256") == digest_of(path) else None


def _write_lines(path: Path, temporary: Path, tables: Iterator[pa.Table], fingerprint: str) -> None:
    rows = 0
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(_line(row) + "\n")
            rows += len(table)
    write_json(record_of(path), {"job": fingerprint, "rows": rows, "sha256": digest_of(temporary)})


def _line(row: dict[str, Any]) -> str:
    """One object; what is not finite is null, and what JSON lacks (dates) is written as text."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError as error:
        raise UserError(
            "a column to keep holds lists of numbers that are not finite, which JSON has not; write Parquet"
        ) from error


# By the ending of the output's name.
FORMATS = {
    ".parquet": Format(rows_of_parquet, _write_parquet),
    ".jsonl": Format(_rows_of_lines, _write_lines),
}
