"""Tables of the kinds of task other than one class of several: suites ``kinds`` and ``embedders``."""

from __future__ import annotations

import statistics
from typing import Any

from bert_decomp.evaluation.metrics import main_metric

from ..records import read_suite
from .markdown import machine, table

# What the tasks are called -> what a reader is told.
TASKS = {
    "topics": "several labels a text",
    "chunks": "a tag for every token",
    "replies": "rerankers",
}


def kinds() -> str:
    """Each task's main metric at a quarter of the encoder, before and after training, mean over seeds."""
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    about = None
    for record in read_suite("kinds"):
        key = (record["task"], record["stage"], record["experiment"])
        cells.setdefault(key, []).append(record)
        about = record["environment"]
    rows = []
    for (task, stage, units), records in sorted(
        cells.items(), key=lambda item: (list(TASKS).index(item[0][0]), *item[0][1:])
    ):
        name = main_metric(records[0]["teacher"])
        own, of_teacher = (
            100 * statistics.mean(record[part][name] for record in records)
            for part in ("metrics", "teacher")
        )
        rows.append(
            [
                f"{TASKS[task]} ({task})",
                "no" if stage == "before" else f"preset {stage}",
                units,
                ", ".join(str(record["seed"]) for record in records),
                name,
                f"{own:.1f}",
                f"{of_teacher:.1f}",
                f"{own - of_teacher:+.1f}",
            ]
        )
    head = ["task", "trained", "units", "seeds", "metric", "of 100", "teacher", "points"]
    return table(head, rows) + f"\n\n{machine(about or {})}."


def embedders() -> str:
    """How near an embedder's vectors stay to its teacher's, mean over seeds."""
    cells: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    about = None
    for record in read_suite("embedders"):
        key = (record["size"], record["stage"], record["experiment"])
        cells.setdefault(key, []).append(record)
        about = record["environment"]
    names = ("cosine", "recall_at_10", "recall_at_10_own_index")
    rows = [
        [
            f"{100 * size:g} %",
            "no" if stage == "before" else f"preset {stage}",
            units,
            ", ".join(str(record["seed"]) for record in records),
            *(
                f"{statistics.mean(record['metrics'][name] for record in records):.3f}"
                for name in names
            ),
        ]
        for (size, stage, units), records in sorted(
            cells.items(), key=lambda item: (-item[0][0], item[0][1], item[0][2])
        )
    ]
    head = ["encoder", "trained", "units", "seeds", *names]
    return table(head, rows) + f"\n\n{machine(about or {})}."
