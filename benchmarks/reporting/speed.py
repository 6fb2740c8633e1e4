"""Tables of time, memory and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records import read_record, read_suite
from .markdown import FIGURES, machine, table


def _encoder(chosen: Callable[[dict[str, Any]], bool] = lambda row: True) -> str:
    """End-to-end times of the rows that ``chosen`` accepts."""
    parts = []
    for result in read_suite("bert"):
        rows = [
            [
                row["shape"],
                row["dtype"],
                row["point"].replace("x", " x ", 1),
                row["size"],
                row["form"] + (f", {row['mode']}" if row["mode"] != "eager" else ""),
                f"{row['latency_ms']:.1f}",
                f"{row['latency_ms_p95']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['over_dense_eager']:.2f}x",
                f"{row['over_strongest_dense']:.2f}x",
            ]
            for row in result["rows"]
            if chosen(row)
        ]
        head = [
            "model",
            "dtype",
            "batch x tokens",
            "size",
            "form",
            "ms",
            "p95",
            "real tokens/s",
            "over dense",
            "over best dense",
        ]
        limits = "; ".join(
            f"{shape} {size} {value:.2f}x"
            for shape, sizes in result["limits"].items()
            for size, value in sizes.items()
        )
        absent = [*result["left_out"], *result["failed"]]
        parts.append(
            table(head, rows)
            + f"\n\nMultiplications of the linear layers allow: {limits}. `mix`: sentences of "
            "real lengths. "
            + (f"Not measured: {'; '.join(absent)}. " if absent else "")
            + f"{result['threads']} CPU thread{'s' * (result['threads'] > 1)}, device {result['device']}. "
            f"{machine(result['environment'])}.\n\n![end to end]({FIGURES}/bert-{result['name']}.svg)"
        )
    return "\n\n".join(parts)


def encoder() -> str:
    """BERT-base at large and mixed batches: dense, low-rank as loaded, and the runtime."""
    return _encoder(
        lambda row: (
            row["shape"] == "bert-base"
            and row["point"] != "1x32"
            and (
                row["form"] in ("dense", "unfused")
                or (row["form"] == "fused runtime" and row["mode"] == "eager")
            )
        ),
    )


def encoder_all() -> str:
    """Every model, point, size and form."""
    return _encoder()


def latency() -> str:
    """Plans made for a latency, and what they took afterwards."""
    rows, result = [], {}
    for result in read_suite("latency-target"):
        for row in result["rows"]:
            off, share_off = (
                f"{100 * (row[name] - 1):+.1f} %"
                for name in ("obtained_over_asked", "obtained_share_over_asked")
            )
            rows.append(
                [
                    f"{row['share']:.0%}",
                    str(row["rank_multiple"]),
                    f"{100 * row['encoder_fraction']:.1f} %",
                    f"{row['asked_ms']:.1f}",
                    f"{row['student_ms']['q50']:.1f}",
                    off,
                    f"{100 * row['obtained_share']:.1f} %",
                    share_off,
                ]
            )
    head = [
        "share of dense asked",
        "rank multiple",
        "encoder kept",
        "asked, ms",
        "took, ms",
        "off",
        "share obtained",
        "off",
    ]
    options = result["options"]
    return (
        table(head, rows)
        + f"\n\n{result['teacher']}, {options['batch_size']} x {options['length']}, {options['threads']} "
        f"thread. {machine(result['environment'])}."
    )


def export() -> str:
    """The exported models on the questions task."""
    result = read_record("export", "questions")
    sizes = list(result["rows"][0]["latency"])
    rows = [
        [
            f"{row['form']} {row['precision']}",
            f"{row['megabytes']:.1f}",
            f"{100 * row['metrics']['accuracy']:.1f} %",
            *(
                f"{row['latency'][size]['ms']:.1f} ({row['latency'][size]['speedup']:.2f}x)"
                for size in sizes
            ),
        ]
        for row in result["rows"]
    ]
    return (
        table(["ONNX file", "MB", "accuracy", *(f"ms, batch {size}" for size in sizes)], rows)
        + f"\n\n{result['examples']} held-out questions, onnxruntime {result['onnxruntime']}, "
        f"{result['threads']} thread. {machine(result['environment'])}."
    )


def decompose() -> str:
    """Time and memory of factoring the base-size encoder."""
    rows, made_with = [], ""
    for result in read_suite("decompose"):
        made_with = machine(result["environment"])
        model, method = result["name"].rsplit("-", 1)
        processor = result.get("decompose_cpu_seconds")
        rows.append(
            [
                model,
                method,
                str(result["matrices"]),
                f"{result['decompose_seconds']:.1f}",
                "not kept" if processor is None else f"{processor:.1f}",
                f"{result['peak_memory_gb']:.2f}",
            ]
        )
    return table(
        ["model", "method", "matrices", "seconds", "processor seconds", "peak memory, GB"], rows
    ) + (f"\n\nProcessor seconds tell what a busy machine stretched. {made_with}.")


def collect() -> str:
    """Memory of collecting the base-size encoder's statistics."""
    rows, made_with = [], ""
    for result in read_suite("collect"):
        made_with = machine(result["environment"])
        model = result["name"].rsplit("-", 2)[0]
        rows.append(
            [
                model,
                str(result["layers_at_once"] or "all"),
                f"{result['statistics_peak_gb']:.2f}",
                f"{result['statistics_file_gb']:.2f}",
                f"{result['statistics_cpu_seconds']:.1f}",
            ]
        )
    return (
        table(["model", "layers at once", "peak memory, GB", "file, GB", "processor seconds"], rows)
        + f"\n\n{made_with}."
    )


def units_cost() -> str:
    """What preparing units costs, by shape of the encoder and by texts."""
    results = read_suite("units-cost")
    if not results:
        return "Not measured yet: `python -m benchmarks.units_cost`."
    steps = ("statistics", "units", "auction", "apply", "refit")
    rows = [
        [
            result["options"]["shape"],
            str(result["options"]["texts"]),
            *(
                f"{result[f'{step}_seconds']:.1f} ({result[f'{step}_cpu_seconds']:.1f}), "
                f"{result[f'{step}_peak_gb']:.1f} GB"
                for step in steps
            ),
            f"{result['statistics_file_gb']:.2f}",
        ]
        for result in sorted(
            results, key=lambda one: (one["statistics_file_gb"], one["options"]["texts"])
        )
    ]
    options = results[0]["options"]
    return (
        table(["layers x width", "texts", *steps, "statistics file, GB"], rows)
        + f"\n\nSeconds by the wall, by the processor in brackets, and the most memory the process held meanwhile; "
        f"{options['threads']} threads, texts of 32 tokens, units `{options['units']}`. "
        f"{machine(results[0]['environment'])}."
    )


def pivoted() -> str:
    """The pivoted encoding against two factors."""
    result = read_record("pivoted", "pivoted")
    tokens = sorted({row["rows"] for row in result["rows"]})
    found = {
        (row["out_features"], row["in_features"], row["form"], row["rows"]): row
        for row in result["rows"]
    }
    rows = [
        [
            f"{outs} x {ins}",
            form,
            str(first["rank"] or ""),
            f"{first['parameters'] / 1e3:.0f} k",
            *(f"{found[outs, ins, form, count]['speedup']:.2f}x" for count in tokens),
        ]
        for (outs, ins, form, count), first in found.items()
        if count == tokens[0]
    ]
    return (
        table(["matrix", "form", "rank", "numbers", *(f"{count} tokens" for count in tokens)], rows)
        + f"\n\nSpeed over the dense layer, {result['threads']} thread. {machine(result['environment'])}."
    )


def distillation() -> str:
    """What each term adds to a training step."""
    rows, made_with = [], ""
    for result in read_suite("distillation"):
        made_with = machine(result["environment"])
        rows += [
            [
                row["terms"],
                f"{row['ratio']:.2f}x",
                f"{row['ratio_q20']:.2f} to {row['ratio_q80']:.2f}",
            ]
            for row in result["rows"]
        ]
    return (
        table(
            [
                "terms (a feature: with logits)",
                "step against plain fine-tuning",
                "20 to 80 % quantile",
            ],
            rows,
        )
        + f"\n\n{made_with}."
    )


def units_time() -> str:
    """What units cost in time."""
    parts = []
    for result in read_suite("units-time"):
        rows = [
            [
                row["form"],
                f"{row['ms']:.1f}",
                f"{row['speed_over_dense']:.2f}x",
                f"{row['speed_over_dense_fused']:.2f}x",
            ]
            for row in result["rows"]
        ]
        shapes = {1: "all-MiniLM-L6-v2", 2: "BERT-base"}[result["width_factor"]]
        parts.append(
            f"Shapes of **{shapes}**, {result['batch_size']} x {result['length']} tokens, "
            f"{result['threads']} thread, torch float32\n\n"
            + table(["form", "ms", "over dense", "over dense fused"], rows)
            + f"\n\n{machine(result['environment'])}."
        )
    return "\n\n".join(parts)
