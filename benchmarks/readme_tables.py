"""Write the tables of the README and other pages from the committed result files, or check that they agree.

    python -m benchmarks.readme_tables [--check]

A table stands in a page between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import bert_plot, soak_table
from .methods import table as methods_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/methods.md", "SECURITY.md")


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['cpu']} ({environment['cpu_capability']}), {environment['cores']} cores, torch "
        f"{environment['torch']}, transformers {environment['transformers']}, commit {environment['commit']}"
    )


def main_job() -> str:
    """Quality, size and speed of the default run."""
    results = _read("main-job-questions.json")
    metrics, parameters = results["metrics"], results["parameters"]
    batch = max(row["batch_size"] for row in results["timings"]["rows"])
    speed = {row["form"]: row for row in results["timings"]["rows"] if row["batch_size"] == batch}
    forms = {"teacher": "dense", "distilled": "low-rank, fused"}
    rows = []
    for stage, values in metrics.items():
        size = parameters["teacher" if stage == "teacher" else "student"]
        row = speed.get(forms.get(stage, ""))
        rows.append(
            [
                stage,
                f"{100 * values['accuracy']:.1f} %",
                f"{100 * values['f1']:.1f}",
                f"{size['whole'] / 1e6:.1f} M",
                f"{size['encoder'] / 1e6:.1f} M",
                f"{row['sentences_per_second']:.0f} ({row['speedup']:.2f}x)" if row else "",
            ]
        )
    total = sum(results["stage_seconds"].values())
    return (
        _table(
            [
                "model",
                "accuracy",
                "macro F1",
                "parameters",
                "encoder alone",
                f"sentences/s, batch {batch}",
            ],
            rows,
        )
        + f"\n\nMethod `{results['options']['method']}`, allocation `{results['options']['allocation']}`, seed "
        f"{results['options']['seed']}, {results['task']['validation']} held-out questions; "
        f"{total / 60:.1f} minutes in all, teacher included; sentences of {results['timings']['length']} tokens, "
        f"{results['timings']['threads']} thread. {_machine(results['environment'])}."
    )


def _encoder(picture: str, chosen: Callable[[dict[str, Any]], bool] = lambda row: True) -> str:
    """End-to-end times; ``picture`` is the path to the results from the page."""
    parts = []
    for path in sorted(RESULTS.glob("bert-*.json")):
        result = _read(path.name)
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
            _table(head, rows)
            + f"\n\nMultiplications of the linear layers allow: {limits}. `mix`: sentences of "
            "real lengths. "
            + (f"Not measured: {'; '.join(absent)}. " if absent else "")
            + f"{result['threads']} CPU thread{'s' * (result['threads'] > 1)}, device {result['device']}. "
            f"{_machine(result['environment'])}.\n\n![end to end]({picture}/{path.stem}.svg)"
        )
    return "\n\n".join(parts)


def encoder() -> str:
    """BERT-base at large and mixed batches: dense, low-rank as loaded, and the runtime."""
    return _encoder(
        "benchmarks/results",
        lambda row: (
            row["shape"] == "bert-base"
            and row["point"] != "1x32"
            and (
                row["form"] in ("dense", "unfused")
                or row["form"] == "fused runtime"
                and row["mode"] == "eager"
            )
        ),
    )


def encoder_all() -> str:
    """Every model, point, size and form."""
    return _encoder("../benchmarks/results")


def base_size() -> str:
    """Quality of the whole job on the base-size encoder, by size."""
    rows, machine = [], ""
    for path in sorted(
        RESULTS.glob("base-size-*.json"),
        key=lambda path: -_read(path.name)["plan"]["encoder_fraction"],
    ):
        result = _read(path.name)
        options, seconds, machine = (
            result["options"],
            result["stage_seconds"],
            _machine(result["environment"]),
        )
        accuracy = [
            f"{100 * result['metrics'][stage]['accuracy']:.1f} %"
            for stage in ("teacher", "decomposed", "distilled")
        ]
        rows.append(
            [
                f"{options['model_name_or_path']}, {result['task']['name']}, seed {options['seed']}",
                f"rank {options['rank']}"
                if options["rank"]
                else f"{100 * result['plan']['encoder_fraction']:.0f} %",
                f"{result['parameters']['student']['encoder'] / 1e6:.1f} M",
                *accuracy,
                options["distillation_preset"],
                f"{options['num_train_epochs']:g}",
                f"{options['learning_rate']:g}",
                *(
                    f"{seconds[stage] / 60:.1f}" if stage in seconds else ""
                    for stage in ("teacher", "distil")
                ),
            ]
        )
    return (
        _table(
            [
                "encoder and task",
                "size",
                "encoder weights",
                "teacher",
                "decomposed",
                "distilled",
                "preset",
                "epochs",
                "learning rate",
                "minutes, teacher",
                "minutes, distillation",
            ],
            rows,
        )
        + f"\n\nOne thread. {machine}."
    )


def export() -> str:
    """The exported models on the questions task."""
    result = _read("export-questions.json")
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
        _table(["ONNX file", "MB", "accuracy", *(f"ms, batch {size}" for size in sizes)], rows)
        + f"\n\n{result['examples']} held-out questions, onnxruntime {result['onnxruntime']}, {result['threads']} thread. "
        f"{_machine(result['environment'])}."
    )


def decompose() -> str:
    """Time and memory of factoring the base-size encoder."""
    rows, machine = [], ""
    for path in sorted(RESULTS.glob("decompose-*.json")):
        result = _read(path.name)
        machine = _machine(result["environment"])
        model, method = path.stem.removeprefix("decompose-").rsplit("-", 1)
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
    return _table(
        ["model", "method", "matrices", "seconds", "processor seconds", "peak memory, GB"], rows
    ) + (f"\n\nProcessor seconds tell what a busy machine stretched. {machine}.")


def collect() -> str:
    """Memory of collecting the base-size encoder's statistics."""
    rows, machine = [], ""
    for path in sorted(RESULTS.glob("collect-*.json")):
        result = _read(path.name)
        machine = _machine(result["environment"])
        model = path.stem.removeprefix("collect-").rsplit("-", 2)[0]
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
        _table(
            ["model", "layers at once", "peak memory, GB", "file, GB", "processor seconds"], rows
        )
        + f"\n\n{machine}."
    )


def latency() -> str:
    """Plans made for a latency, and what they took afterwards."""
    rows, result = [], {}
    for path in sorted(RESULTS.glob("latency-target-*.json")):
        result = _read(path.name)
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
        _table(head, rows)
        + f"\n\n{result['teacher']}, {options['batch_size']} x {options['length']}, {options['threads']} "
        f"thread. {_machine(result['environment'])}."
    )


def method_errors() -> str:
    """What each method makes small."""
    parts = []
    for path in sorted(RESULTS.glob("method-errors-*.json"), reverse=True):
        result = _read(path.name)
        least = min(row["loss"] for row in result["rows"])
        rows = [
            [
                f"{row['method']}, {row['allocation']}",
                f"{row['smallest_rank']} to {row['largest_rank']}",
                f"{100 * row['weight']:.0f} %",
                f"{100 * row['output']:.1f} %",
                f"{row['loss'] / least:.1f}",
                f"{1000 * row['divergence']:.0f}",
                f"{100 * row['metrics']['accuracy']:.1f} %",
            ]
            for row in sorted(result["rows"], key=lambda row: -row["loss"])
        ]
        parts.append(
            f"**{result['task']}**, {100 * result['options']['size']:g} % of the encoder, seed "
            f"{result['options']['seed']}, teacher {100 * result['teacher']['accuracy']:.1f} %\n\n"
            + _table(
                [
                    "method, ranks",
                    "from to",
                    "weight error",
                    "output error",
                    "loss error",
                    "KL",
                    "accuracy",
                ],
                rows,
            )
            + f"\n\n{_machine(result['environment'])}."
        )
    return "\n\n".join(parts)


def pivoted() -> str:
    """The pivoted encoding against two factors."""
    result = _read("pivoted.json")
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
        _table(
            ["matrix", "form", "rank", "numbers", *(f"{count} tokens" for count in tokens)], rows
        )
        + f"\n\nSpeed over the dense layer, {result['threads']} thread. {_machine(result['environment'])}."
    )


def methods() -> str:
    """The comparison of methods."""
    return methods_table.table(*methods_table.read()).strip()


def ablation() -> str:
    """The ablation of distillation terms."""
    return methods_table.table(*methods_table.read("ablation")).strip()


def presets() -> str:
    """The presets of the distillation on several seeds."""
    return methods_table.table(*methods_table.read("presets")).strip()


def distillation() -> str:
    """What each term adds to a training step."""
    rows, machine = [], ""
    for path in sorted(RESULTS.glob("distillation-*.json")):
        result = _read(path.name)
        machine = _machine(result["environment"])
        rows += [
            [
                row["terms"],
                f"{row['ratio']:.2f}x",
                f"{row['ratio_q20']:.2f} to {row['ratio_q80']:.2f}",
            ]
            for row in result["rows"]
        ]
    return (
        _table(
            [
                "terms (a feature: with logits)",
                "step against plain fine-tuning",
                "20 to 80 % quantile",
            ],
            rows,
        )
        + f"\n\n{machine}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "main-job": main_job,
    "latency": latency,
    "encoder": encoder,
    "encoder-all": encoder_all,
    "base-size": base_size,
    "decompose": decompose,
    "collect": collect,
    "methods": methods,
    "method-errors": method_errors,
    "pivoted": pivoted,
    "export": export,
    "ablation": ablation,
    "presets": presets,
    "distillation": distillation,
    "soak": soak_table.figures,
    "faults": soak_table.faults,
}


def render(text: str) -> str:
    """``text`` with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n(?:.*?\n)??<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the README differs"
    )
    check = parser.parse_args().check
    if not check:
        bert_plot.draw(RESULTS)
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if check and after != before:
            print(
                f"{page} and benchmarks/results disagree; run python -m benchmarks.readme_tables",
                file=sys.stderr,
            )
            return 1
        if not check:
            path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
