"""Result files: one JSON-lines file for each suite in ``benchmarks/results/``, one named record a line.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "pivoted.jsonl"
>>> save_record(path, "slow", {"ms": 2.0})
>>> save_record(path, "fast", {"ms": 1.0})
>>> save_record(path, "slow", {"ms": 3.0})
>>> read_records(path)
[{'name': 'fast', 'ms': 1.0}, {'name': 'slow', 'ms': 3.0}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bert_decomp.io.atomic import exclusive_lock, write_text

RESULTS = Path(__file__).resolve().parent / "results"


def processor(environment: dict[str, Any]) -> str:
    """Name and instruction sets of a record's processor, as part of the record's name.

    >>> processor({"cpu": "AMD EPYC", "cpu_features": ["avx2"]})
    'amd_epyc_avx2'
    """
    return "_".join([environment["cpu"].lower().replace(" ", "_"), *environment["cpu_features"]])


def suite_file(suite: str) -> Path:
    """The committed result file of a suite."""
    return RESULTS / f"{suite}.jsonl"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a result file, sorted by name; an absent file has none."""
    path = Path(path)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_suite(suite: str) -> list[dict[str, Any]]:
    """Every record of a suite's committed result file."""
    return read_records(suite_file(suite))


def grouped(records: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    """Records by the values of some of their keys.

    >>> list(grouped([{"task": "a", "seed": 1}, {"task": "a", "seed": 2}], "task"))
    [('a',)]
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def read_record(suite: str, name: str) -> dict[str, Any]:
    """One record of a suite's committed result file.

    Raises:
        KeyError: the suite has no record of that name.
    """
    return {entry["name"]: entry for entry in read_suite(suite)}[name]


def save_record(path: str | Path, name: str, content: dict[str, Any]) -> None:
    """Add a record to a result file, or replace the one of that name.

    Several processes may save to one file: its folder is locked in the meantime.
    """
    path = Path(path)
    with exclusive_lock(path.parent, seconds=60):
        records = {entry["name"]: entry for entry in read_records(path)}
        records[name] = {"name": name, **content}
        lines = [json.dumps(records[key], allow_nan=False) for key in sorted(records)]
        write_text(path, "".join(f"{line}\n" for line in lines))
