"""The README's table and picture: accuracy against time of one model, all-MiniLM-L6-v2 on ``questions``.

Accuracy comes from the suite ``units`` (before any training, mean of its seeds), time from ``benchmarks.units_time``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_decomp.io.atomic import write_text

from ..records import read_record, read_suite
from .markdown import FIGURES, machine, table

TASK, TIMES = "questions", "x1-8x128-1t"
# Units by their name in the result files -> what a reader is told.
NAMES = {
    "matrices": "two factors a matrix",
    "structured": "smaller heads and layers",
    "mixed": "whatever loses least",
}
SIZES = (0.25, 0.125)


@dataclass(frozen=True)
class Point:
    """One form of the model: ``accuracy`` and ``teacher`` in percent, ``weights`` of the encoder, ``ms`` a batch, the
    better of the plain and the fused form, and how much faster than the plain dense model that is."""

    units: str
    size: float
    accuracy: float
    teacher: float
    weights: float
    ms: float
    speed: float


def _times() -> dict[str, dict[str, Any]]:
    return {row["form"]: row for row in read_record("units-time", TIMES)["rows"]}


def points() -> list[Point]:
    """Every compressed form that has both an accuracy and a time."""
    times, result = _times(), []
    for units in NAMES:
        for size in SIZES:
            records = [
                record
                for record in read_suite("units")
                if (record["task"], record["experiment"], record["size"], record["stage"])
                == (TASK, units, size, "before")
            ]
            if not records:
                continue
            best = min(
                (times[f"{units} {size:g}{form}"] for form in ("", ", fused")),
                key=lambda row: row["ms"],
            )
            result.append(
                Point(
                    units,
                    size,
                    100 * sum(record["metrics"]["accuracy"] for record in records) / len(records),
                    100 * sum(record["teacher"]["accuracy"] for record in records) / len(records),
                    sum(record["parameters"]["encoder"] for record in records) / len(records),
                    best["ms"],
                    best["speed_over_dense"],
                )
            )
    return result


def front() -> str:
    """The dense model and its compressed forms: accuracy, size, time."""
    times, forms = _times(), points()
    dense = forms[0].weights / forms[0].size
    rows = [
        ["dense", f"{forms[0].teacher:.1f} %", f"{dense / 1e6:.1f} M", _ms(times["dense"]), "1.00x"]
    ]
    for size, units in ((0.25, "matrices"), (0.25, "structured"), (0.125, "structured")):
        point = next(point for point in forms if (point.size, point.units) == (size, units))
        rows.append(
            [
                f"{100 * size:g} %, {NAMES[units]}",
                f"{point.accuracy:.1f} %",
                f"{point.weights / 1e6:.1f} M",
                f"{point.ms:.0f}",
                f"{point.speed:.2f}x",
            ]
        )
    head = ["encoder kept", "accuracy, untrained", "encoder weights", "ms, 8 x 128", "speed-up"]
    environment = read_record("units-time", TIMES)["environment"]
    return (
        table(head, rows)
        + "\n\nall-MiniLM-L6-v2 on 981 held-out questions, mean of three seeds, before any distillation; one thread, "
        f"float32. {machine(environment)}.\n\n![accuracy against time]({FIGURES}/front.svg)"
    )


def _ms(row: dict[str, Any]) -> str:
    return f"{row['ms']:.0f}"


def draw(folder: Path) -> None:
    """Write the picture ``front.svg`` into ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "front"
    times, forms = _times(), points()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    teacher = forms[0].teacher
    axes.axhline(teacher, color="0.8", linewidth=1, zorder=0)
    for form in ("dense", "dense, fused"):
        axes.plot(times[form]["ms"], teacher, "s", color="0.3")
        axes.annotate(
            form, (times[form]["ms"], teacher), (0, -15), textcoords="offset points", ha="center"
        )
    for units, label in NAMES.items():
        own = [point for point in forms if point.units == units]
        axes.plot([p.ms for p in own], [p.accuracy for p in own], "o-", label=label)
        for point in own:
            axes.annotate(
                f"{100 * point.size:g} %",
                (point.ms, point.accuracy),
                (6, -12),
                textcoords="offset points",
            )
    axes.set_xlim(0, 1.08 * times["dense"]["ms"])
    axes.margins(y=0.1)
    axes.set_xlabel("milliseconds a batch of 8 x 128, one thread, float32")
    axes.set_ylabel("accuracy before any training, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    # matplotlib ends lines with spaces.
    write_text(
        folder / "front.svg",
        "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n",
    )
