"""The figures of the long drivers in ``tests/robustness/`` and the faults fixed, as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..records import read_record, read_suite

FAULTS = Path(__file__).resolve().parents[2] / "tests" / "robustness" / "fixed_faults.json"
# What a driver was told rather than what it counted, and what stands in a column of its own.
LEFT_OUT = ("options", "environment", "failures", "findings", "failed", "seed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def counts(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result by name: those of ``counts``, else all; those that stand in groups are added up by name,
    and of the slowest and the most the greatest counts.
    """
    found: dict[str, float] = {}
    values = result.get("counts", result)
    for name, value in values.items():
        if name in LEFT_OUT:
            continue
        if _is_number(value):
            found[name] = value
        elif isinstance(value, dict):
            groups = [group for group in value.values() if isinstance(group, dict)] or [value]
            total: dict[str, float] = {}
            for group in groups:
                for key, number in group.items():
                    if _is_number(number) and key not in LEFT_OUT and key not in values:
                        extreme = key.startswith(("slowest", "most"))
                        total[key] = (
                            max(total.get(key, number), number)
                            if extreme
                            else total.get(key, 0) + number
                        )
            found |= {f"{name}: {key}": number for key, number in total.items()}
    return found


def _first(value: Any, name: str) -> Any:
    """The first entry of that name, at any depth of nested dicts."""
    if not isinstance(value, dict):
        return None
    return (
        value[name]
        if name in value
        else next((v for v in (_first(v, name) for v in value.values()) if v is not None), None)
    )


def _failed(result: dict[str, Any]) -> int:
    values = [result[name] for name in ("failures", "findings", "failed") if name in result]
    return sum(value if _is_number(value) else len(value) for value in values)


def figures() -> str:
    """One row a driver: what it counted, what failed in the committed run, and the commit that was run."""
    lines = ["| driver | counted | failures | commit |", "| --- | --- | ---: | --- |"]
    for result in read_suite("robustness"):
        counted = "; ".join(
            f"{name.replace('_', ' ')} {number:,.10g}" for name, number in counts(result).items()
        )
        lines.append(
            f"| `tests.robustness.{result['name']}` | {counted} | {_failed(result)} "
            f"| {(_first(result, 'environment') or {}).get('commit')} |"
        )
    return "\n".join(lines)


def odd_files() -> str:
    """What ``lowrank-bert evaluate`` makes of each odd file: how it is read, or why it is refused."""
    lines = ["| file | what it gives |", "| --- | --- |"]
    for entry in read_record("robustness", "odd_files")["cases"]:
        result = entry["evaluate"]
        gives = (
            "; ".join(result["data"])
            if result["exit_code"] == 0
            else f"refused: {result['message']}"
        )
        cell = gives.replace("|", "\\|").replace("/text.", "text.")
        lines.append(f"| {entry['file']} | {cell} |")
    return "\n".join(lines)


def faults() -> str:
    """The faults that were fixed, each with the test that covers it."""
    faults = json.loads(FAULTS.read_text(encoding="utf-8"))
    return "\n".join(
        [
            f"Fixed: {len(faults)}.",
            "",
            "| fault | test |",
            "| --- | --- |",
            *(f"| {entry['fault']} | `{entry['test']}` |" for entry in faults),
        ]
    )
