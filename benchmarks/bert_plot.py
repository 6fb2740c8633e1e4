"""The plot beside each result file of ``benchmarks.bert``: where the time goes. ``readme_tables`` draws it."""

from __future__ import annotations

from pathlib import Path

from bert_decomp.evaluation.plots import time_split
from bert_decomp.io.atomic import write_text
from bert_decomp.io.json import read_json


def draw(folder: Path) -> None:
    """Write an SVG for every ``bert-*.json`` in ``folder``: the time split of eager forms at the first shape's first point
    with the largest batch."""
    for path in sorted(folder.glob("bert-*.json")):
        rows = [row for row in read_json(path)["rows"] if row["mode"] == "eager"]
        rows = [
            row
            for row in rows
            if (row["shape"], row["dtype"]) == (rows[0]["shape"], rows[0]["dtype"])
        ]
        point = max(rows, key=lambda row: row["padded_tokens"])["point"]
        chosen = {f"{row['size']}, {row['form']}": row for row in rows if row["point"] == point}
        write_text(
            path.with_suffix(".svg"),
            time_split(
                {name: row["time_split"] for name, row in chosen.items()},
                {name: row["latency_ms"] for name, row in chosen.items()},
            ),
        )
