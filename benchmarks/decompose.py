"""Time and peak memory of factoring every matrix of the base-size encoder, given its statistics.

    python -m benchmarks.decompose [--model_name_or_path all-mpnet-base-v2] [--method whiten] [--rank 245]

Statistics are collected from real questions first; the time reported is the factoring alone, the memory is the whole
process's peak. Results go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from bert_decomp.command import command
from bert_decomp.decompose import DecompositionConfig, decompose_
from bert_decomp.environment import environment
from bert_decomp.files import write_json
from bert_decomp.models import batches, load_model, load_tokenizer, tokenize
from bert_decomp.selection import select_linears
from bert_decomp.statistics import collect_statistics
from bert_decomp.tasks import load_task


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="all-mpnet-base-v2")
    parser.add_argument("--method", default="whiten")
    parser.add_argument("--rank", type=int, default=245)
    parser.add_argument("--samples", type=int, default=512, help="calibration questions")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    task = load_task("questions").limited(options.samples, 1)
    tokenizer = load_tokenizer(options.model_name_or_path)
    model = load_model(options.model_name_or_path, num_labels=len(task.label_names))
    train, _ = tokenize(task, tokenizer, 128)
    start = time.perf_counter()
    statistics = collect_statistics(model, batches(train, tokenizer, 64), select_linears(model))
    collected = time.perf_counter()
    plan = decompose_(model, DecompositionConfig(options.method, rank=options.rank), statistics)
    result = {"statistics_seconds": collected - start, "decompose_seconds": time.perf_counter() - collected,
              "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
              "matrices": len(plan.matrices), "calibration_questions": len(train)}
    name = Path(options.model_name_or_path).name
    path = options.output_dir / f"decompose-{name}-{options.method}.json"
    write_json(path, {"command": " ".join(["python -m benchmarks.decompose", *argv]), "environment": environment(), **result})
    print(f"{result['matrices']} matrices in {result['decompose_seconds']:.1f} s, peak {result['peak_memory_gb']:.2f} GB")
    print(path)


if __name__ == "__main__":
    sys.exit(command(main))
