"""Tokens a second of ``lowrank-bert predict``, against the runtime alone: ``python -m benchmarks.predict``.

Movie sentences, repeated, through a MiniLM classifier of random weights at 25 % (mixed units), in one thread a process.
The yardstick is the fused model on the same texts, tokenised, sorted and padded beforehand. Its runs alternate with the
job's in one and in two processes; the median of each counts. Peak memory is that of the job's processes together.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bert_decomp.cli.command import command
from bert_decomp.data.task import load_task
from bert_decomp.data.windows import TextSource
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_tokenizer
from bert_decomp.models.saving import save
from bert_decomp.prediction.predictor import BATCH_TOKENS, Predictor, token_batches

from .records import processor, save_record, suite_file
from .units_time import dense_model, stored_twins

SIZE = 0.25


def write_texts(path: Path, rows: int) -> None:
    """Held-out movie sentences, as often as needed."""
    import pyarrow as pa
    import pyarrow.parquet

    texts = list(load_task("movies").validation["text"])
    texts = (texts * (rows // len(texts) + 1))[:rows]
    pyarrow.parquet.write_table(pa.table({"id": range(rows), "text": texts}), path)


def runtime_speed(predictor: Predictor, path: Path) -> tuple[float, int]:
    """Seconds of the model alone on all texts of the file, and their tokens."""
    texts = [text for window in TextSource.open(str(path)).windows() for text in window.texts[0]]
    encoded = predictor.encode([texts])
    lengths = predictor.lengths(encoded)
    batches = [
        predictor._batch(encoded, rows) for rows in token_batches(lengths, predictor.batch_tokens)
    ]
    with torch.inference_mode():
        predictor.model(**batches[0])
        start = time.perf_counter()
        for batch in batches:
            predictor.model(**batch)
        return time.perf_counter() - start, sum(lengths)


def job(folder: Path, texts: Path, processes: int, *options: str) -> dict[str, float]:
    """One run of the command: tokens a second, and its peak memory in megabytes."""
    output = texts.with_name("out.parquet")
    output.unlink(missing_ok=True)
    start = "from bert_decomp.cli.main import entry; entry()"
    line = [sys.executable, "-c", start, "predict", str(folder), str(texts)]
    line += ["--output", str(output), "--processes", str(processes), *options]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    peak, team = 0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            alive = [team, *team.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in alive))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    said = process.stdout.read() if process.stdout else ""
    found = re.search(r"(\d+) tokens in ([\d.]+) s", said)
    if process.returncode or found is None:
        raise RuntimeError(f"predict ended with code {process.returncode}: {said}")
    return {"tokens_a_second": int(found[1]) / float(found[2]), "megabytes": peak / 1e6}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[BATCH_TOKENS])
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--output", type=Path, default=suite_file("predict"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (twin,) = (
            model
            for name, model in stored_twins(dense_model(1), [SIZE], 1).items()
            if name.startswith("mixed")
        )
        saved, texts = Path(folder) / "model", Path(folder) / "texts.parquet"
        save(twin, load_tokenizer("all-MiniLM-L6-v2"), saved)
        write_texts(texts, options.rows)
        for budget in options.batch_tokens:
            extra = ["--batch_tokens", str(budget), *(["--int8"] if options.int8 else [])]
            first = next(TextSource.open(str(texts)).windows())
            predictor = Predictor(
                str(saved),
                batch_tokens=budget,
                calibration=[first.texts[0][:256]] if options.int8 else None,
            )
            alone, jobs = [], {1: [], 2: []}
            for _ in range(options.repeats):
                seconds, tokens = runtime_speed(predictor, texts)
                alone.append(tokens / seconds)
                for processes, runs in jobs.items():
                    runs.append(job(saved, texts, processes, *extra))
            speed = statistics.median(alone)
            one, two = (
                statistics.median(run["tokens_a_second"] for run in jobs[count]) for count in (1, 2)
            )
            rows.append(
                {
                    "batch_tokens": budget,
                    "tokens": tokens,
                    "runtime": speed,
                    "one_process": one,
                    "two_processes": two,
                    "megabytes": {
                        str(count): max(run["megabytes"] for run in runs)
                        for count, runs in jobs.items()
                    },
                }
            )
            print(
                f"{budget} tokens a batch: the runtime alone {speed:.0f} tokens a second, one process {one:.0f} "
                f"({one / speed:.2f}x), two {two:.0f} ({two / one:.2f}x of one); "
                f"{rows[-1]['megabytes']['1']:.0f} and {rows[-1]['megabytes']['2']:.0f} MB",
                flush=True,
            )
    save_record(
        options.output,
        f"minilm-{'int8' if options.int8 else 'fp32'}-{processor(start)}",
        {
            "command": " ".join(["python -m benchmarks.predict", *argv]),
            "texts": options.rows,
            "repeats": options.repeats,
            "rows": rows,
            "environment": start,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
