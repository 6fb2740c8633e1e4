"""Measured choices: one JSON file for each GPU, written by ``python -m lowrank_kernels.tune``, and how one is read.

A file holds, for each measured problem, the fastest backend (which may be ``torch``, two matmuls, or ``dense``), the
options it used, and the times of all rivals. An entry without a measurement does not exist: a problem whose operator,
dtype, widths and rank class were not measured has none; only the rows are taken from the nearest measurement.

Files are looked for in the folder named by ``LOWRANK_KERNELS_TABLES``, then in ``tables/``.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .backends import Options, get_backend
from .problem import RANK_CLASSES, Problem
from .strict_json import unique_keys

ENVIRONMENT = "LOWRANK_KERNELS_TABLES"
VERSION = 2
WIDTH_BUCKET = 128
# Bytes of a table file: an entry has some 500, a table some 2000 of them.
LIMIT = 16 * 2**20
# Milliseconds that no operator takes.
LONGEST = 1e9
KEY = re.compile(
    r"[a-z_]{1,32}/[a-z0-9]{1,16}/k[0-9]{1,9}/n[0-9]{1,9}/f[0-9]{1,9}/r[0-9]{1,9}/m[1-9][0-9]{0,11}"
)


class TableError(ValueError):
    """A table file that cannot be used. The text is one line: what is wrong and what to do."""


@dataclass(frozen=True)
class Entry:
    """The measured winner of one problem: its backend, that backend's options, and every rival's milliseconds."""

    backend: str
    options: Options
    milliseconds: dict[str, float]


def file_name(device: str) -> str:
    """The file of a GPU by its name: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def folders() -> list[Path]:
    """Where tables are looked for, first hit wins."""
    named = os.environ.get(ENVIRONMENT)
    return ([Path(named)] if named else []) + [Path(__file__).parent / "tables"]


def family(problem: Problem) -> str:
    """The part of a problem's key that must match: operator, dtype, widths to the next 128, rank class."""
    inner, outer, hidden = (
        -(-width // WIDTH_BUCKET) * WIDTH_BUCKET
        for width in (problem.inner, problem.outer, problem.hidden)
    )
    rank = next((size for size in RANK_CLASSES if problem.rank <= size), problem.rank)
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.operator}/{dtype}/k{inner}/n{outer}/f{hidden}/r{rank}"


def key(problem: Problem) -> str:
    """The key of a problem in a table: its family and its rows to the next power of two."""
    return f"{family(problem)}/m{1 << max(problem.rows - 1, 0).bit_length()}"


class Table:
    """The measured choices of one GPU."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._families: dict[str, dict[int, Entry]] = {}
        for name, entry in entries.items():
            kind, rows = name.rsplit("/m", 1)
            self._families.setdefault(kind, {})[int(rows)] = entry
        self.find = lru_cache(maxsize=4096)(self._find)

    def _find(self, problem: Problem) -> Entry | None:
        """The entry with the nearest number of rows (on a log scale) among those of the same family, or None."""
        measured = self._families.get(family(problem))
        if not measured:
            return None
        rows = math.log2(max(problem.rows, 1))
        return measured[min(measured, key=lambda m: abs(math.log2(m) - rows))]


def parse(text: str, source: str) -> Table:
    """Read a table's JSON.

    Raises:
        TableError: it is not a table of this version; ``source`` is named.
    """
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
        if (
            not isinstance(content, dict)
            or type(content.get("version")) is not int
            or content["version"] != VERSION
        ):
            raise ValueError("another version")
        return Table({name: _entry(name, value) for name, value in content["entries"].items()})
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise TableError(
            f"{source} is no tuning table of version {VERSION} ({str(error)[:200]}); write it again with "
            "python -m lowrank_kernels.tune"
        ) from error


def _entry(name: str, value: dict) -> Entry:
    """One entry, every number of it within what a kernel can be asked for; a ValueError or TypeError otherwise."""
    backend, times = value["backend"], value["milliseconds"]
    if not KEY.fullmatch(name):
        raise ValueError(f"{name[:100]!r} names no problem")
    try:
        options = get_backend(backend).parse_options(value.get("options") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(times, dict) or not all(
        type(time) in (int, float) and 0 <= time <= LONGEST for time in times.values()
    ):
        raise ValueError(f"{name} has times that are no milliseconds")
    return Entry(backend, options, times)


def read(path: Path) -> str:
    """The text of a table file.

    Raises:
        TableError: it is no regular file, too long for a table, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
            raise TableError(
                f"{path} is no tuning table: it is no regular file of at most {LIMIT} bytes"
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=None)
def load(device: str) -> Table | None:
    """The table of the GPU of that name, or None where it was not measured.

    Raises:
        TableError: its file is damaged.
    """
    for folder in folders():
        path = folder / file_name(device)
        if path.exists():
            return parse(read(path), str(path))
    return None
