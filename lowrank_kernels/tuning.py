"""Measured choices: one JSON file for each GPU, and how one is read.

A file holds, for each measured problem, the fastest backend (which may be ``torch``, two matmuls, or ``dense``), the
options it used, and the times of all rivals; once for eager calls, where the host's time counts, and once for calls in
a CUDA graph. An entry without a measurement does not exist: a problem whose operator, dtype, widths and rank class were
not measured has none; only the rows are taken from the nearest measurement.

Tables of ``python -m lowrank_kernels.tune`` are looked for in the folder named by ``LOWRANK_KERNELS_TABLES``, then in
the user's cache, then in ``tables/``; by the GPU's name, and failing that among GPUs of the same compute capability and
number of multiprocessors. What the calibration of ``fuse_`` measured is kept in the user's cache for one GPU and one
set of versions, and counts more.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backends import Options, get_backend
from .problem import RANK_CLASSES, Problem
from .strict_json import unique_keys

ENVIRONMENT = "LOWRANK_KERNELS_TABLES"
CACHE_ENVIRONMENT = "LOWRANK_KERNELS_CACHE"
VERSION = 2
WIDTH_BUCKET = 128
# Widths that are no multiple of this are compiled in slower forms, so they are measured for themselves.
WIDTH_MULTIPLE = 16
# Bytes of a table file: an entry has some 800, a table some 2000 of them.
LIMIT = 16 * 2**20
# Milliseconds that no operator takes.
LONGEST = 1e9
KEY = re.compile(
    r"[a-z_]{1,32}/[a-z0-9]{1,16}/k[0-9]{1,9}/n[0-9]{1,9}/f[0-9]{1,9}/r[0-9]{1,9}/m[1-9][0-9]{0,11}"
)
COLUMNS = ("eager", "captured")


class TableError(ValueError):
    """A table file that cannot be used. The text is one line: what is wrong and what to do."""


class Gpu(NamedTuple):
    """What a measurement belongs to: the GPU's name, its compute capability ("9.0") and its multiprocessors."""

    name: str
    capability: str
    processors: int


@dataclass(frozen=True)
class Choice:
    """The measured winner of one problem: its backend, that backend's options, and every rival's milliseconds."""

    backend: str
    options: Options
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """The winners of one problem: where the host's time counts, and in a CUDA graph."""

    eager: Choice
    captured: Choice


def gpu(index: int | None = None) -> Gpu:
    """The GPU of that number, or the current one."""
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(torch.cuda.get_device_name(index), capability, properties.multi_processor_count)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def file_name(name: str) -> str:
    """The file of a GPU by its name: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3.json"."""
    return _slug(name) + ".json"


def cache_folder() -> Path:
    """The folder of the user's own measurements."""
    named = os.environ.get(CACHE_ENVIRONMENT)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "lowrank_kernels"


def folders() -> list[Path]:
    """Where tables are looked for, first hit wins."""
    named = os.environ.get(ENVIRONMENT)
    own = [Path(named)] if named else []
    return [*own, cache_folder() / "tables", Path(__file__).parent / "tables"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def calibration_file(device: Gpu) -> Path:
    """Where calibration keeps what it measured on a GPU with these versions of torch, Triton and this package."""
    parts = [device.name, f"cc{device.capability}", f"{device.processors}sm"]
    versions = {"torch": str(torch.__version__)}
    versions |= {package: _version(package) for package in ("triton", "lowrank-bert")}
    parts += [f"{package} {version}" for package, version in versions.items()]
    return cache_folder() / "calibration" / ("-".join(map(_slug, parts)) + ".json")


def any_tables() -> bool:
    """Whether anything was measured on any GPU."""
    places = [*folders(), cache_folder() / "calibration"]
    return any(next(folder.glob("*.json"), None) is not None for folder in places)


def _bucket(width: int) -> int:
    return width if width % WIDTH_MULTIPLE else -(-width // WIDTH_BUCKET) * WIDTH_BUCKET


def family(problem: Problem) -> str:
    """The part of a problem's key that must match: operator, dtype, widths to the next 128, rank class."""
    inner, outer, hidden = map(_bucket, (problem.inner, problem.outer, problem.hidden))
    rank = next((size for size in RANK_CLASSES if problem.rank <= size), problem.rank)
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.operator}/{dtype}/k{inner}/n{outer}/f{hidden}/r{rank}"


def key(problem: Problem) -> str:
    """The key of a problem in a table: its family and its rows to the next power of two."""
    return f"{family(problem)}/m{1 << max(problem.rows - 1, 0).bit_length()}"


class Table:
    """The measured choices of one GPU; ``measured_on`` is its name."""

    def __init__(self, entries: Mapping[str, Entry], measured_on: str = "this GPU") -> None:
        self.entries, self.measured_on = dict(entries), measured_on
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


def entry_as_json(entry: Entry, rank: int) -> dict[str, Any]:
    """An entry as files have it; ``rank`` is the rank that was measured."""
    return {**{column: asdict(getattr(entry, column)) for column in COLUMNS}, "rank": rank}


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
        entries = {name: _entry(name, value) for name, value in content["entries"].items()}
        return Table(entries, str(content.get("device"))[:100])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise TableError(
            f"{source} is no tuning table of version {VERSION} ({str(error)[:200]}); write it again with "
            "python -m lowrank_kernels.tune"
        ) from error


def _entry(name: str, value: dict) -> Entry:
    """One entry, every number of it within what a kernel can be asked for; a ValueError or TypeError otherwise."""
    if not KEY.fullmatch(name):
        raise ValueError(f"{name[:100]!r} names no problem")
    return Entry(*(_choice(name, value[column]) for column in COLUMNS))


def _choice(name: str, value: dict) -> Choice:
    backend, times = value["backend"], value["milliseconds"]
    try:
        options = get_backend(backend).parse_options(value.get("options") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(times, dict) or not all(
        type(time) in (int, float) and 0 <= time <= LONGEST for time in times.values()
    ):
        raise ValueError(f"{name} has times that are no milliseconds")
    return Choice(backend, options, times)


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


def write(
    path: Path, device: Gpu, environment: Mapping[str, str], entries: Mapping[str, dict]
) -> None:
    """Write a table file; a reader sees the old one or the new one.

    Args:
        path: the file; its folder is made.
        device: what was measured.
        environment: versions, for the reader.
        entries: ``entry_as_json`` by ``key``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "version": VERSION,
        "device": device.name,
        "capability": device.capability,
        "processors": device.processors,
        "environment": dict(environment),
        "entries": dict(entries),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def measured(path: Path) -> dict[str, dict]:
    """The entries of a table file, to be added to; none if there is no file.

    Raises:
        TableError: it is damaged.
    """
    if not path.exists():
        return {}
    text = read(path)
    parse(text, str(path))
    return json.loads(text)["entries"]


def find_file(device: Gpu) -> Path | None:
    """The table for a GPU: its own, or one of a GPU with its capability and number of multiprocessors, or None."""
    own = (folder / file_name(device.name) for folder in folders())
    result = next((path for path in own if path.exists()), None)
    if result is not None:
        return result
    for folder in folders():
        for path in sorted(folder.glob("*.json")):
            try:
                content = json.loads(read(path))
            except (TableError, ValueError, RecursionError):
                continue
            if isinstance(content, dict) and device[1:] == (
                content.get("capability"),
                content.get("processors"),
            ):
                return path
    return None


def load(device: Gpu) -> Table | None:
    """What was measured on a GPU, or on one like it; None where nothing was.

    Raises:
        TableError: a file of it is damaged.
    """
    paths = [path for path in (find_file(device), calibration_file(device)) if path is not None]
    tables = [parse(read(path), str(path)) for path in paths if path.exists()]
    if not tables:
        return None
    entries = {name: entry for table in tables for name, entry in table.entries.items()}
    return Table(entries, tables[0].measured_on)
