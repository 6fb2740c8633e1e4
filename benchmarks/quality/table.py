"""A quality suite's table and plot from its result file.

The mean over seeds of the task's main metric, with the standard deviation and the number of seeds, one row an
experiment and one column a share of the encoder's weights.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections import defaultdict
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import main_metric

from ..records import read_suite
from .suite import STAGES

Rows = dict[str, dict[float, list[dict[str, Any]]]]
Groups = dict[tuple[str, str], Rows]


def read(
    suite: str = "methods",
) -> tuple[Groups, dict[str, dict[int, float]], list[dict[str, Any]]]:
    """Results by (task, stage), experiment and size; the teachers' percentages by task and seed; and all results."""
    results = read_suite(suite)
    if not results:
        raise UserError(
            f"the suite {suite!r} has no results; make them with python -m benchmarks.quality.run --suite {suite}"
        )
    groups: Groups = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    teachers: dict[str, dict[int, float]] = defaultdict(dict)
    for result in results:
        groups[result["task"], result["stage"]][result["experiment"]][result["size"]].append(result)
        teachers[result["task"]][result["seed"]] = (
            100 * result["teacher"][main_metric(result["metrics"])]
        )
    return groups, teachers, results


def percentages(results: list[dict[str, Any]]) -> list[float]:
    """The main metric of each result, of 100."""
    return [100 * result["metrics"][main_metric(result["metrics"])] for result in results]


def divergent(rows: Rows) -> bool:
    """Whether every result has a divergence; the oldest have none."""
    return all(
        "divergence" in result for row in rows.values() for cell in row.values() for result in cell
    )


def deviation(values: list[float]) -> float:
    """Standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    around = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"


def counted(values: list[float]) -> str:
    """Mean, standard deviation and number of seeds."""
    return f"{spread(values)} ({len(values)})"


def _rows(rows: Rows) -> list[str]:
    """One table in Markdown, best experiments first; with divergences if every result of it has one."""
    sizes = sorted({size for row in rows.values() for size in row}, reverse=True)
    with_divergence = divergent(rows)

    def cells(row: dict[float, list[dict[str, Any]]], size: float) -> list[str]:
        if size not in row:
            return ["not run"] * (1 + with_divergence)
        found = [counted(percentages(row[size]))]
        return (
            [*found, spread([1000 * result["divergence"] for result in row[size]])]
            if with_divergence
            else found
        )

    def merit(name: str) -> float:
        smallest = rows[name].get(sizes[-1])
        if smallest is None:
            return -math.inf
        return (
            -statistics.mean(result["divergence"] for result in smallest)
            if with_divergence
            else statistics.mean(percentages(smallest))
        )

    head = [
        title for size in sizes for title in [f"{100 * size:.1f} %", "KL"][: 1 + with_divergence]
    ]
    return [
        "| experiment | " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * len(head),
        *(
            f"| {name} | "
            + " | ".join(cell for size in sizes for cell in cells(rows[name], size))
            + " |"
            for name in sorted(rows, key=merit, reverse=True)
        ),
    ]


def by_stage(group: tuple[tuple[str, str], Rows]) -> tuple[str, int]:
    """The order of tables and panels: task, then how far the training goes."""
    task, stage = group[0]
    return task, list(STAGES).index(stage)


def table(
    groups: Groups, teachers: dict[str, dict[int, float]], results: list[dict[str, Any]]
) -> str:
    """Every task's and stage's table in Markdown."""
    lines = [
        "Accuracy in percent: mean ± standard deviation (seeds), by share of the encoder's weights kept. KL: "
        "divergence of the answers from the teacher's, in thousandths of a nat.",
        "",
    ]
    for (task, stage), rows in sorted(groups.items(), key=by_stage):
        lines += [
            f"**{task}, {stage}{' training' * (stage == 'before')}**, teacher {counted(list(teachers[task].values()))}",
            "",
            *_rows(rows),
            "",
        ]
    about = results[0]["environment"]
    machines = ", ".join(
        f"{key} {value}" for key, value in about.items() if isinstance(value, (str, int, float))
    )
    return "\n".join([*lines, f"Made with {machines}."]) + "\n"


def _lines(axis: Axes, rows: Rows, colours: dict[str, Any], teacher: float) -> None:
    """Metric against encoder weight, one line an experiment."""
    for name, row in sorted(rows.items()):
        sizes = sorted(row)
        axis.errorbar(
            [100 * size for size in sizes],
            [statistics.mean(percentages(row[size])) for size in sizes],
            [deviation(percentages(row[size])) for size in sizes],
            marker="o",
            markersize=3,
            capsize=2,
            label=name,
            color=colours[name],
            linestyle="-" if "waterfill" in name else "--",
        )
    axis.axhline(teacher, color="grey", linewidth=0.8, label="teacher")
    axis.set(xlabel="encoder weights kept, %", ylabel="accuracy, %")
    axis.legend(fontsize=7)


def _ladder(axis: Axes, rows: Rows) -> None:
    """Divergence from the teacher at the one size that there is, experiments below each other."""
    found = {
        name: [1000 * result["divergence"] for cell in row.values() for result in cell]
        for name, row in rows.items()
    }
    names = sorted(found, key=lambda name: -statistics.mean(found[name]))
    for place, name in enumerate(names):
        axis.errorbar(
            statistics.mean(found[name]),
            place,
            xerr=deviation(found[name]),
            marker="o",
            markersize=4,
            capsize=2,
            color="C0",
        )
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="divergence from the teacher, thousandths of a nat", xlim=(0, None))
    axis.grid(axis="x", linewidth=0.3)


def plot(groups: Groups, teachers: dict[str, dict[int, float]]) -> str:
    """One panel a task and stage, two a row: lines over sizes or, where there is one size, a ladder; SVG text.

    Stages that have one size each and belong to one task share a ladder, so that they can be compared.
    """
    ladder = all(
        len({size for row in rows.values() for size in row}) == 1 and divergent(rows)
        for rows in groups.values()
    )
    panels: dict[tuple[str, ...], Rows] = {}
    for (task, stage), rows in sorted(groups.items(), key=by_stage):
        title = "before training" if stage == "before" else stage
        panels.setdefault((task,) if ladder else (task, title), {}).update(rows)
    names = sorted({name for rows in panels.values() for name in rows})
    colours = dict(zip(names, itertools.cycle(matplotlib.colormaps["tab20"].colors)))
    lines, columns = math.ceil(len(panels) / 2), min(len(panels), 2)
    figure = Figure(figsize=(6.4 * columns, 4.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (about, rows) in zip(axes.flat, panels.items(), strict=False):
        if ladder:
            _ladder(axis, rows)
        else:
            _lines(axis, rows, colours, statistics.mean(teachers[about[0]].values()))
        axis.set_title(", ".join(about))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
