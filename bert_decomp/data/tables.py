"""Reading files of rows as they were written: CSV, TSV, JSON-lines and Parquet.

Nothing is dropped, merged or retyped here: a row that does not fit is named by its line, and the values of CSV and TSV
files stay strings, because only the labels' meaning can say whether ``01`` is a number and ``NA`` a missing value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.json import check_file
from .conll import read_conll
from .delimited import read_csv, read_tsv
from .guards import MAX_COLUMNS, check_json, check_parquet
from .table import Table, check_names, decoded


def read_table(path: str) -> Table:
    """Read a file of rows by its ending: ``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet`` or
    ``.conll``.

    Raises:
        UserError: the file is absent, empty, damaged or of an unknown kind, a row does not fit the header, or there are
            two ways to read it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f"{path}: cannot read files ending in {suffix!r}; use one of {', '.join(READERS)}"
        )
    check_present(path)
    try:
        table = READERS[suffix](path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(table) == 0:
        raise UserError(f"{path} holds no examples; give a file with examples")
    return table


def check_present(path: str) -> None:
    """Raise UserError unless there is such a file and it holds something."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if check_file(path).stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with examples")


def _read_json(path: str) -> Table:
    from lowrank_kernels.strict_json import unique_keys

    check_json(path)
    text, encoding = decoded(path)
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
    check_names(path, data.column_names)
    return Table(
        path,
        "Parquet",
        dict(zip(data.column_names, columns, strict=True)),
        class_names=_class_names(metadata),
    )


def _class_names(metadata: Any) -> dict[str, tuple[str, ...]]:
    """The names of ``ClassLabel`` columns, and of lists of such, which ``datasets`` writes beside the schema."""
    try:
        features = metadata["info"]["features"]
        return {
            column: tuple(feature["names"])
            for column, feature in (
                (column, feature.get("feature", feature)) for column, feature in features.items()
            )
            if feature["_type"] == "ClassLabel"
            and all(isinstance(n, str) for n in feature["names"])
        }
    except (KeyError, TypeError, AttributeError):
        return {}


READERS: dict[str, Callable[[str], Table]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": read_conll,
}
