"""The README's table and picture: accuracy against time of one model, all-MiniLM-L6-v2 on ``questions``.

Times come from benchmarks.engines. Accuracy before training comes from the suite ``units``, in int8 from
benchmarks.int8_accuracy, both as means over the same seeds; after distillation from the suite ``distilled``, which has
both, with teachers of its own.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

from bert_decomp.io.atomic import write_text

from ..records import grouped, read_suite
from .engines import (
    DENSE,
    accuracies,
    accuracy_records,
    best_equipped,
    is_ours,
    strongest_rival,
)
from .markdown import machine, table

TASK, SHAPE, POINT = "questions", "minilm", "8x128"
# Units by their name in the result files -> what a reader is told.
NAMES = {
    "matrices": "two factors a matrix",
    "structured": "smaller heads and layers",
    "mixed": "whatever loses least",
}
SIZES = (0.25, 0.125)
# What the table shows beside the dense model in torch and in its fastest engine: share of the encoder, units, engine.
SHOWN = (
    (0.25, "matrices", "fused fp32"),
    (0.25, "structured", "fused int8"),
)
# One of the forms, whose teachers are the dense model.
SMALL = "structured 0.25"
# Curves of the picture: units, engine, line.
CURVES = (
    ("matrices", "fused fp32", "o-"),
    ("mixed", "fused fp32", "o-"),
    ("structured", "fused fp32", "o-"),
    ("structured", "fused int8", "o--"),
    ("structured", "OpenVINO int8", "o--"),
)


def _record() -> dict[str, Any]:
    [record] = best_equipped(
        [one for one in read_suite("engines") if (one["shape"], one["threads"]) == (SHAPE, 1)]
    )
    return record


def _seeds() -> list[int]:
    return [record["seed"] for record in accuracy_records(TASK)]


def _times() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["form"], row["engine"]): row for row in _record()["rows"] if row["point"] == POINT}


def _forms(suite: str, stage: str) -> dict[str, list[dict[str, Any]]]:
    """Records of a suite's stage by form."""
    records = [one for one in read_suite(suite) if (one["task"], one["stage"]) == (TASK, stage)]
    cells = grouped(records, "experiment", "size")
    return {f"{experiment} {size:g}": found for (experiment, size), found in cells.items()}


@cache
def _units() -> dict[str, list[dict[str, Any]]]:
    """Records of the suite ``units`` by form, of the seeds whose int8 accuracy was measured too."""
    seeds = _seeds()
    return {
        form: [record for record in records if record["seed"] in seeds]
        for form, records in _forms("units", "before").items()
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def accuracy(form: str, engine: str) -> float:
    """Accuracy of a form in percent; in int8 as it was measured in that engine.

    Raises:
        KeyError: it was not measured.
    """
    if "int8" in engine:
        return accuracies(accuracy_records(TASK))[form, engine]
    records = _units()["matrices 0.25" if form == DENSE else form]
    kind = "teacher" if form == DENSE else "metrics"
    return 100 * _mean([record[kind]["accuracy"] for record in records])


@cache
def _distilled() -> dict[str, list[dict[str, Any]]]:
    """Records of the suite ``distilled`` by form."""
    return _forms("distilled", "best")


def distilled(form: str, engine: str) -> str:
    """Accuracy after distillation in percent and in points less than the same teachers', which are the dense model;
    nothing for that in int8, where they were not run."""
    records = _distilled()[SMALL if form == DENSE else form]
    teacher = _mean([one["teacher"]["accuracy"] for one in records])
    if form == DENSE:
        return "" if "int8" in engine else f"{100 * teacher:.1f} %"
    own = _mean(
        [(one["int8"] if "int8" in engine else one)["metrics"]["accuracy"] for one in records]
    )
    return f"{100 * own:.1f} % ({100 * (own - teacher):+.1f})"


def weights(form: str) -> float:
    """Weights of a form's encoder."""
    if form == DENSE:
        return _mean(
            [
                record["parameters"]["encoder"] / record["encoder_fraction"]
                for record in _units()["matrices 0.25"]
            ]
        )
    return _mean([record["parameters"]["encoder"] for record in _units()[form]])


def front() -> str:
    """The dense model and its compressed forms: accuracy, size, time."""
    times, record = _times(), _record()
    rival = strongest_rival(list(times.values()))["engine"]
    variants = [("dense", DENSE, engine) for engine in dict.fromkeys(("torch fp32", rival))]
    variants += [
        (f"{100 * size:g} %, {NAMES[units]}", f"{units} {size:g}", engine)
        for size, units, engine in SHOWN
    ]
    rows = [
        [
            name,
            engine,
            f"{accuracy(form, engine):.1f} %",
            distilled(form, engine),
            f"{weights(form) / 1e6:.1f} M",
            f"{times[form, engine]['ms']:.0f}",
            f"{times[form, engine]['over_dense']['torch fp32']:.2f}x",
            f"{times[form, engine]['over_dense'][rival]:.2f}x",
        ]
        for name, form, engine in variants
    ]
    head = [
        "encoder kept",
        "engine",
        "accuracy, untrained",
        "distilled",
        "encoder weights",
        "ms, 8 x 128",
        "over torch",
        f"over {rival}, dense",
    ]
    seeds, environment = ", ".join(map(str, _seeds())), record["environment"]
    return (
        table(head, rows) + "\n\nall-MiniLM-L6-v2 on 981 held-out questions, mean over seeds "
        f"({seeds}); distilled: after eight epochs, with the points from the same teachers. One thread. "
        f'"fused" is this project\'s runtime; {rival} is the fastest other engine for the dense model here '
        f"(instruction sets: {', '.join(environment['cpu_features'])}). {machine(environment)}."
    )


def draw(folder: Path) -> None:
    """Write the picture ``front.svg`` into ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "front"
    times = _times()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (form, engine), row in times.items():
        # Where torch is as fast, ONNX Runtime's float32 would only hide the others.
        if form != DENSE or engine == "ONNX Runtime fp32":
            continue
        point = (row["ms"], accuracy(form, engine))
        colour = "black" if is_ours(engine) else "0.55"
        axes.plot(*point, "s", color=colour)
        # Written upwards, for these points lie side by side.
        axes.annotate(
            f"dense, {engine}",
            point,
            (-3, 8),
            textcoords="offset points",
            rotation=60,
            color=colour,
            fontsize=8,
        )
    colours = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for units, engine, line in CURVES:
        forms = [f"{units} {size:g}" for size in SIZES]
        values = [accuracy(form, engine) for form in forms]
        axes.plot(
            [times[form, engine]["ms"] for form in forms],
            values,
            line,
            color=colours[units] if is_ours(engine) else "0.55",
            label=f"{NAMES[units]}, {engine}",
        )
        if line == "o-":
            for size, form, value in zip(SIZES, forms, values, strict=True):
                axes.annotate(
                    f"{100 * size:g} %",
                    (times[form, engine]["ms"], value),
                    (6, -12),
                    textcoords="offset points",
                    fontsize=8,
                )
    axes.set_xlim(0, 1.12 * max(row["ms"] for row in times.values()))
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.1, high + 0.45 * (high - low))
    axes.set_xlabel("milliseconds a batch of 8 x 128, one thread")
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
