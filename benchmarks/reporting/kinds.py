"""Tables of the kinds of task other than one class of several: suites ``kinds`` and ``embedders``."""

from __future__ import annotations

import statistics

from bert_decomp.evaluation.metrics import main_metric

from ..records import grouped, read_suite
from .markdown import machine, seeds, table, trained

# What the tasks are called -> what a reader is told.
TASKS = {
    "topics": "several labels a text",
    "chunks": "a tag for every token",
    "replies": "rerankers",
}


def kinds() -> str:
    """Each task's main metric at a quarter of the encoder, before and after training, mean over seeds."""
    found, rows = read_suite("kinds"), []
    cells = grouped(found, "task", "stage", "experiment")
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
                trained(stage),
                units,
                seeds(records),
                name,
                f"{own:.1f}",
                f"{of_teacher:.1f}",
                f"{own - of_teacher:+.1f}",
            ]
        )
    head = ["task", "trained", "units", "seeds", "metric", "of 100", "teacher", "points"]
    return table(head, rows) + f"\n\n{machine(found[-1]['environment'])}."


def embedders() -> str:
    """How near an embedder's vectors stay to its teacher's, mean over seeds."""
    found = read_suite("embedders")
    cells = grouped(found, "size", "stage", "experiment")
    names = ("cosine", "recall_at_10", "recall_at_10_own_index")
    rows = [
        [
            f"{100 * size:g} %",
            trained(stage),
            units,
            seeds(records),
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
    return table(head, rows) + f"\n\n{machine(found[-1]['environment'])}."
