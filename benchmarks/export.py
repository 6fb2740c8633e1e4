"""Size, accuracy and one-thread latency of {dense, low-rank} x {fp32, int8} in onnxruntime, on the questions task.

    python -m benchmarks.export TEACHER COMPRESSED [--threads 1]

TEACHER and COMPRESSED are saved folders: a fine-tuned dense model and what ``python -m bert_decomp.run`` made of it.
All four files are timed in turn in one process, on the same real questions, padded to the longest of each batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from bert_decomp.cli.command import command
from bert_decomp.data.task import load_task
from bert_decomp.evaluation.latency import take_turns
from bert_decomp.evaluation.metrics import metrics_of
from bert_decomp.exporting.export import export
from bert_decomp.exporting.onnx import FORMAT, load
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_model, load_tokenizer

from .records import save_record, suite_file


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="folder of the fine-tuned dense model")
    parser.add_argument("compressed", help="folder of the low-rank model")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each file and batch size")
    parser.add_argument("--output", type=Path, default=suite_file("export"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    task, tokenizer = load_task("questions"), load_tokenizer(options.compressed)
    texts, labels = list(task.validation["text"]), np.array(task.validation["label"])

    def batches(size: int) -> list[dict[str, torch.Tensor]]:
        return [
            dict(tokenizer(texts[start : start + size], padding=True, return_tensors="pt"))
            for start in range(0, len(texts), size)
        ]

    runs, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for form, source in (("dense", options.teacher), ("low-rank", options.compressed)):
            model = load_model(source)
            for precision in ("fp32", "int8"):
                path = Path(folder) / f"{form}-{precision}{Path(FORMAT.target).suffix}"
                worst, _ = export(
                    model, tokenizer, path, int8=precision == "int8", texts=texts[:60]
                )
                run = runs[form, precision] = load(path, options.threads)
                logits = torch.cat([run(batch) for batch in batches(32)]).numpy()
                rows.append(
                    {
                        "form": form,
                        "precision": precision,
                        "megabytes": path.stat().st_size / 1e6,
                        "difference_from_torch": worst,
                        "metrics": metrics_of(logits, labels),
                        "latency": {},
                    }
                )
    for size in options.batch_sizes:
        # The batch of median length.
        batch = sorted(batches(size), key=lambda one: one["input_ids"].shape[1])[
            len(texts) // size // 2
        ]
        times = take_turns({key: partial(run, batch) for key, run in runs.items()}, options.seconds)
        first = float(np.median(times["dense", "fp32"]))
        for row in rows:
            values = times[row["form"], row["precision"]]
            row["latency"][str(size)] = {
                "tokens": batch["input_ids"].shape[1],
                "ms": float(np.median(values)) * 1e3,
                "ms_p95": float(np.quantile(values, 0.95)) * 1e3,
                "speedup": first / float(np.median(values)),
            }
    save_record(
        options.output,
        "questions",
        {
            "environment": environment(),
            "onnxruntime": version("onnxruntime"),
            "options": {"batch_sizes": options.batch_sizes, "seconds": options.seconds},
            "threads": options.threads,
            "task": "questions",
            "data": task.fingerprint,
            "examples": len(texts),
            "rows": rows,
        },
    )
    for row in rows:
        latency = ", ".join(
            f"batch {size} {value['ms']:.1f} ms ({value['speedup']:.2f}x)"
            for size, value in row["latency"].items()
        )
        print(
            f"{row['form']:>8} {row['precision']}: {row['megabytes']:6.1f} MB, accuracy "
            f"{100 * row['metrics']['accuracy']:.1f} %, {latency}"
        )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
