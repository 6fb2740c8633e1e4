"""The figures of the pages, drawn from the result files by ``python -m benchmarks.reporting.tables``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_decomp.evaluation.plots import time_split
from bert_decomp.io.atomic import write_text

from ..quality import table as suite_table
from ..records import read_suite
from . import front, operators

QUALITY_SUITES = ("methods", "ablation", "presets")


def encoder(record: dict[str, Any]) -> str:
    """The time split of eager forms at the first shape's point with the largest batch, as SVG text."""
    rows = [row for row in record["rows"] if row["mode"] == "eager"]
    rows = [
        row for row in rows if (row["shape"], row["dtype"]) == (rows[0]["shape"], rows[0]["dtype"])
    ]
    point = max(rows, key=lambda row: row["padded_tokens"])["point"]
    chosen = {f"{row['size']}, {row['form']}": row for row in rows if row["point"] == point}
    return time_split(
        {name: row["time_split"] for name, row in chosen.items()},
        {name: row["latency_ms"] for name, row in chosen.items()},
    )


def draw(folder: Path) -> None:
    """Write every figure into ``folder``."""
    for record in read_suite("bert"):
        write_text(folder / f"bert-{record['name']}.svg", encoder(record))
    for record in read_suite("operators"):
        operators.plot(record, folder / f"operators-{record['name']}.png")
    for suite in QUALITY_SUITES:
        groups, teachers, _ = suite_table.read(suite)
        write_text(folder / f"{suite}.svg", suite_table.plot(groups, teachers))
    front.draw(folder)
