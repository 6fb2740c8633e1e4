"""Consecutive rows of Parquet files and of saved data sets, read in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .guards import check_parquet
from .pieces import Piece
from .table import Table, check_names

if TYPE_CHECKING:
    import pyarrow as pa

# Rows that are decoded at once.
STEP = 256


def _typed_pieces(
    path: str, layout: str, parts: Iterator[pa.Table], rows: int, size: int
) -> Iterator[Piece]:
    """Small tables joined to pieces of ``rows`` rows or ``size`` bytes."""
    import pyarrow as pa

    held: list[pa.Table] = []
    first = 1

    def piece() -> Piece:
        data = pa.concat_tables(held)
        flat = [name for name in data.column_names if _is_plain(data.schema.field(name).type)]
        columns: dict[str, list[Any]] = {name: data[name].to_pylist() for name in flat}
        # Values of other columns are no text; that they are there is enough.
        others = {name: [()] * len(data) for name in data.column_names if name not in flat}
        ordered = {name: (columns | others)[name] for name in data.column_names}
        return Piece(Table(path, layout, ordered, first=first), data)

    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= rows or sum(one.nbytes for one in held) >= size:
            yield piece()
            first += sum(map(len, held))
            held = []
    if held:
        yield piece()


def _is_plain(kind: Any) -> bool:
    """Whether a column holds texts, numbers, or lists of words."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return bool(
            pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
        )
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def parquet_pieces(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """A Parquet file, about ``rows`` rows or ``size`` bytes at a time, with the columns ``names``, or all.

    Raises:
        UserError: it is damaged, or no Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet

    check_parquet(path)

    def parts() -> Iterator[pa.Table]:
        try:
            # Column by column from the disk: a row group may be larger than memory.
            file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
            check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(STEP, columns=names, use_threads=False):
                yield pa.Table.from_batches([batch])
        except UserError:
            raise
        except Exception as error:  # whatever the reader makes of a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read as parquet: {reason}") from error

    yield from _typed_pieces(path, "Parquet", parts(), rows, size)


def dataset_pieces(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """A folder that ``datasets`` wrote with ``save_to_disk``, in the same manner.

    Raises:
        UserError: it is none, or holds several splits.
    """
    from datasets import Dataset

    if not (Path(path) / "state.json").is_file():
        raise UserError(
            f"{path} is no data set of datasets' save_to_disk; give the folder of one split, or a file"
        )
    try:
        data = Dataset.load_from_disk(path).with_format("arrow", columns=names)
    except Exception as error:  # whatever the library makes of a damaged folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a data set: {reason}") from error
    yield from _typed_pieces(path, "data set", data.iter(STEP), rows, size)
