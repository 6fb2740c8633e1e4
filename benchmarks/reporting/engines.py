"""Tables of the runtime against other engines: times of benchmarks.engines, accuracies of benchmarks.int8_accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records import processor, read_suite
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


def best_equipped(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the processor with the most instruction sets."""
    best = processor(
        max(records, key=lambda record: len(record["environment"]["cpu_features"]))["environment"]
    )
    return [record for record in records if processor(record["environment"]) == best]


def accuracy_records(task: str) -> list[dict[str, Any]]:
    """One record a seed of the accuracy in every engine."""
    return best_equipped(
        [record for record in read_suite("int8-accuracy") if record["task"] == task]
    )


def _means(
    records: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> dict[tuple[str, str], float]:
    """A value of the rows by (form, engine), mean over the records."""
    cells: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for row in record["rows"]:
            cells.setdefault((row["form"], row["engine"]), []).append(value(row))
    return {key: sum(values) / len(values) for key, values in cells.items()}


def accuracies(records: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Accuracy in percent by (form, engine), mean over the records."""
    return _means(records, lambda row: 100 * row["metrics"]["accuracy"])


def int8_accuracy() -> str:
    """Accuracy of every form in every engine, a table for each task and processor."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in read_suite("int8-accuracy"):
        key = record["task"], processor(record["environment"])
        groups.setdefault(key, []).append(record)
    return "\n\n".join(map(_accuracy_table, groups.values()))


def _accuracy_table(records: list[dict[str, Any]]) -> str:
    cells = {key: f"{value:.1f} %" for key, value in accuracies(records).items()}
    explained = ""
    # The oldest records have no divergence.
    if all("divergence" in row for record in records for row in record["rows"]):
        for key, value in _means(records, lambda row: 1000 * row["divergence"]).items():
            cells[key] += f" ({value:.1f})"
        explained = " (in brackets: KL divergence from the dense model in torch, 1/1000 nats)"
    forms, engines = (list(dict.fromkeys(key[index] for key in cells)) for index in (0, 1))
    rows = [[engine, *(cells[form, engine] for form in forms)] for engine in engines]
    seeds = ", ".join(str(record["seed"]) for record in records)
    environment = records[0]["environment"]
    return (
        table(["accuracy", *map(form_name, forms)], rows)
        + f"\n\n{records[0]['examples']} held-out texts of `{records[0]['task']}`, before any distillation{explained}, "
        f"mean over seeds ({seeds}); instruction sets {', '.join(environment['cpu_features'])}. {machine(environment)}."
    )


def int8_folder() -> str:
    """Megabytes of a model's folders, and what each way to a fused model takes at its start."""
    parts = []
    for record in read_suite("int8-folder"):
        rows = []
        for row in record["rows"]:
            whole = row["megabytes"]["float32"]
            sizes = [
                f"{size:.1f} ({100 * size / whole:.0f} %)" for size in row["megabytes"].values()
            ]
            starts = [
                f"{way['seconds']:.1f} s, {way['megabytes']:.0f} MB" for way in row["ways"].values()
            ]
            rows.append([row["form"], *sizes, *starts])
        head = ["", "float32, MB", "float16", "int8"]
        head += ["start in float32", "calibrated to int8", "from the int8 folder"]
        parts.append(
            table(head, rows)
            + "\n\nall-MiniLM-L6-v2, dense and with a quarter of its encoder's weights; half of the dense model are "
            "word embeddings. Starts: seconds, and growth of the peak memory, in a fresh process without its imports, "
            f"medians of {record['repeats']}, one thread. {machine(record['environment'])}."
        )
    return "\n\n".join(parts)
