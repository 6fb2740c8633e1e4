"""Time and peak memory of factoring every matrix of the base-size encoder, given its statistics.

    python -m benchmarks.decompose [--model_name_or_path all-mpnet-base-v2] [--method whiten] [--rank 245]
    python -m benchmarks.decompose --collect_only [--layers_at_once 3]

Statistics are collected from real questions first; the time reported is the factoring alone, by the wall and by the
processor, which a busy machine does not stretch. The memory is the whole process's peak. With ``--collect_only`` it is
the peak of collecting inputs and gradients alone, all at once or a few layers at a time. Results go to
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.data.batches import batches, encode
from bert_decomp.data.task import load_task
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.io.environment import environment
from bert_decomp.methods import get_method
from bert_decomp.models.loading import load_model, load_tokenizer
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import Statistics, collect_to_file

from .records import save_record, suite_file


def timed(name: str, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``call`` returns, and its seconds by the wall and by the processor."""
    start, processor = time.perf_counter(), time.process_time()
    found = call()
    return found, {
        f"{name}_seconds": time.perf_counter() - start,
        f"{name}_cpu_seconds": time.process_time() - processor,
    }


def peak_gb() -> float:
    """The most that this process has had in memory so far, pages of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="all-mpnet-base-v2")
    parser.add_argument("--method", default="whiten")
    parser.add_argument("--rank", type=int, default=245)
    parser.add_argument("--samples", type=int, default=512, help="calibration questions")
    parser.add_argument(
        "--collect_only", action="store_true", help="measure the collection of statistics alone"
    )
    parser.add_argument(
        "--layers_at_once",
        type=int,
        help="encoder layers whose statistics are held in memory at once",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="(default: decompose.jsonl or collect.jsonl in benchmarks/results)",
    )
    options = parser.parse_args(argv)
    task = load_task("questions").limited(options.samples, 1)
    tokenizer = load_tokenizer(options.model_name_or_path)
    model = load_model(options.model_name_or_path, num_labels=len(task.label_names))
    train = encode(task.train, tokenizer, 128)
    needs = ("inputs", "gradients") if options.collect_only else get_method(options.method).needs
    result: dict[str, Any] = {
        "calibration_questions": len(train),
        "needs": needs,
        "layers_at_once": options.layers_at_once,
        "threads": torch.get_num_threads(),
        "peak_before_gb": peak_gb(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path, modules = Path(folder) / "statistics.safetensors", select_linears(model)
        _, seconds = timed(
            "statistics",
            lambda: collect_to_file(
                path,
                model,
                batches(train, tokenizer, 64),
                modules,
                needs=needs,
                layers_at_once=options.layers_at_once,
            ),
        )
        result.update(
            seconds,
            statistics_peak_gb=peak_gb(),
            statistics_file_gb=path.stat().st_size / 1e9,
            matrices=len(modules),
        )
        if not options.collect_only:
            statistics = Statistics.load(path)
            plan, seconds = timed(
                "decompose",
                lambda: decompose_(
                    model,
                    DecompositionConfig(options.method, rank=options.rank),
                    statistics=statistics,
                ),
            )
            result.update(seconds, matrices=len(plan.matrices))
    result["peak_memory_gb"] = peak_gb()
    model_name = Path(options.model_name_or_path).name
    suite, name = "decompose", f"{model_name}-{options.method}"
    if options.collect_only:
        suite, name = "collect", f"{model_name}-{options.layers_at_once or 'all'}-layers"
    path = options.output or suite_file(suite)
    save_record(
        path,
        name,
        {
            "command": " ".join(["python -m benchmarks.decompose", *argv]),
            "environment": environment(),
            **result,
        },
    )
    print(
        f"{result['matrices']} matrices, peak {result['peak_memory_gb']:.2f} GB, "
        + ", ".join(
            f"{name} {value:.1f}" for name, value in result.items() if name.endswith("seconds")
        )
    )
    print(path)


if __name__ == "__main__":
    sys.exit(command(main))
