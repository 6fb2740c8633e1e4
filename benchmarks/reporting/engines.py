"""Tables of the runtime against other engines: times of benchmarks.engines, accuracies of benchmarks.int8_accuracy."""

from __future__ import annotations

from typing import Any

from ..records import read_suite
from .markdown import machine, table

SHAPES = {"minilm": "all-MiniLM-L6-v2", "bert-base": "BERT-base"}
DENSE = "dense"


def is_ours(engine: str) -> bool:
    """Whether an engine is this project's runtime."""
    return engine.startswith("fused")


def strongest_rival(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the rows in which another engine runs the dense model."""
    return min(
        (row for row in rows if row["form"] == DENSE and not is_ours(row["engine"])),
        key=lambda row: row["ms"],
    )


def form_name(form: str) -> str:
    """``dense``, or units and share of the encoder: ``mixed 0.25`` is ``mixed 25 %``."""
    if form == DENSE:
        return form
    units, size = form.rsplit(" ", 1)
    return f"{units} {100 * float(size):g} %"


def _point(rows: list[dict[str, Any]]) -> str:
    rival = strongest_rival(rows)
    forms, engines = (list(dict.fromkeys(row[key] for row in rows)) for key in ("form", "engine"))
    cells = {}
    for row in rows:
        text = f"{row['ms']:.1f} ({row['over_dense'][rival['engine']]:.2f}x)"
        cells[row["form"], row["engine"]] = f"**{text}**" if row is rival else text
    body = [[engine, *(cells[form, engine] for form in forms)] for engine in engines]
    head = [f"ms, {rows[0]['point'].replace('x', ' x ', 1)}", *map(form_name, forms)]
    return table(head, body)


def engines() -> str:
    """Every form in every engine: milliseconds, and speed over the strongest dense rival, which is bold."""
    parts = []
    for record in read_suite("engines"):
        points = list(dict.fromkeys(row["point"] for row in record["rows"]))
        environment = record["environment"]
        parts.append(
            f"Shapes of **{SHAPES[record['shape']]}**\n\n"
            + "\n\n".join(
                _point([row for row in record["rows"] if row["point"] == point]) for point in points
            )
            + f"\n\n{record['threads']} thread, instruction sets {', '.join(environment['cpu_features'])}; "
            f"OpenVINO {environment['openvino']}, NNCF {environment['nncf']}, ONNX Runtime "
            f"{environment['onnxruntime']}. {machine(environment)}."
        )
    return "\n\n".join(parts)


def accuracy_seeds() -> list[int]:
    """Seeds of the models whose accuracy was measured in every engine."""
    return [record["seed"] for record in read_suite("int8-accuracy")]


def accuracies() -> dict[tuple[str, str], float]:
    """Accuracy in percent by (form, engine), mean of the seeds."""
    cells: dict[tuple[str, str], list[float]] = {}
    for record in read_suite("int8-accuracy"):
        for row in record["rows"]:
            cells.setdefault((row["form"], row["engine"]), []).append(row["metrics"]["accuracy"])
    return {key: 100 * sum(values) / len(values) for key, values in cells.items()}


def int8_accuracy() -> str:
    """Accuracy of every form in every engine."""
    records, cells = read_suite("int8-accuracy"), accuracies()
    forms, engines = (list(dict.fromkeys(key[index] for key in cells)) for index in (0, 1))
    rows = [[engine, *(f"{cells[form, engine]:.1f} %" for form in forms)] for engine in engines]
    seeds = ", ".join(map(str, accuracy_seeds()))
    return (
        table(["accuracy", *map(form_name, forms)], rows)
        + f"\n\n{records[0]['examples']} held-out questions, before any distillation, mean over seeds ({seeds}). "
        f"{machine(records[0]['environment'])}."
    )
