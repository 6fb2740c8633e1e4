"""Measured choices: one JSON file for each GPU, written by ``python -m lowrank_kernels.tune``, and how one is read.

A file holds, for each measured problem, the fastest backend (which may be ``torch``, two matmuls, or ``dense``), the
tile it used, and the times of all rivals. An entry without a measurement does not exist: a problem whose operator,
dtype, widths and rank class were not measured has none; only the rows are taken from the nearest measurement.

Files are looked for in the folder named by ``LOWRANK_KERNELS_TABLES``, then beside this file.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..backends import Problem
from ..triton_backend.tiles import RANK_CLASSES, Tile

ENVIRONMENT = "LOWRANK_KERNELS_TABLES"
VERSION = 1
WIDTH_BUCKET = 128


@dataclass(frozen=True)
class Entry:
    """The measured winner of one problem: its backend, its tile if it has one, and every rival's milliseconds."""

    backend: str
    tile: Tile | None
    milliseconds: dict[str, float]


def file_name(device: str) -> str:
    """The file of a GPU by its name: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def folders() -> list[Path]:
    """Where tables are looked for, first hit wins."""
    named = os.environ.get(ENVIRONMENT)
    return ([Path(named)] if named else []) + [Path(__file__).parent]


def family(problem: Problem) -> str:
    """The part of a problem's key that must match: operator, dtype, widths to the next 128, rank class."""
    inner, outer, hidden = (-(-width // WIDTH_BUCKET) * WIDTH_BUCKET for width in
                            (problem.inner, problem.outer, problem.hidden))
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
        ValueError: it is not a table of this version; ``source`` is named.
    """
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        entries = {
            name: Entry(value["backend"], Tile(**value["tile"]) if value.get("tile") else None, value["milliseconds"])
            for name, value in content["entries"].items()
        }
        return Table(entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source} is no tuning table of version {VERSION} ({error}); write it anew with "
            "python -m lowrank_kernels.tune"
        ) from error


@lru_cache(maxsize=None)
def load(device: str) -> Table | None:
    """The table of the GPU of that name, or None where it was not measured."""
    for folder in folders():
        path = folder / file_name(device)
        if path.is_file():
            return parse(path.read_text(encoding="utf-8"), str(path))
    return None
