"""A million short texts through ``lowrank-bert predict``, killed twice: ``python -m benchmarks.million``.

Questions, each with a number of its own, through a MiniLM classifier of random weights at 12.5 % (structured units) in
int8, two processes of one thread. SIGKILL ends the whole job when a tenth is done, and again at half; the same command
goes on each time. Then every row must be there once and in order, and a sample of them as the model alone answers it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import torch

from bert_decomp.cli.command import command
from bert_decomp.data.task import load_task
from bert_decomp.data.windows import WINDOW_ROWS
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_tokenizer
from bert_decomp.models.saving import save
from bert_decomp.prediction.predictor import CALIBRATION, Predictor

from .records import processor, save_record, suite_file
from .units_time import dense_model, stored_twins

SIZE = 0.125
KILLED_AT = (0.1, 0.5)
CHECKED = 2000


def texts_of(start: int, stop: int, questions: list[str]) -> list[str]:
    """The texts of some rows; no two of the whole file are equal."""
    return [f"{questions[row % len(questions)]} {row}" for row in range(start, stop)]


def write_texts(path: Path, rows: int, questions: list[str]) -> None:
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            stop = min(start + 50_000, rows)
            columns = {"id": range(start, stop), "text": texts_of(start, stop, questions)}
            writer.write_table(pa.table(columns, schema=schema))


def run(line: list[str], parts: Path, kill_at: int | None) -> dict[str, Any]:
    """The command until it ends, or is killed when ``kill_at`` shards are there: seconds, shards, largest process."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    team, done = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            for one in (team, *team.children(recursive=True)):
                peak = max(peak, one.memory_info().rss)
        except psutil.NoSuchProcess:
            pass
        # At the end they are joined and go.
        done = max(done, len(list(parts.glob("*.parquet"))))
        if kill_at is not None and done >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    if kill_at is None and process.returncode:
        raise RuntimeError(f"predict ended with code {process.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "windows": done,
        "killed": process.returncode == -signal.SIGKILL,
        "largest_process_mb": peak / 1e6,
    }


def largest_difference(output: Path, folder: Path, rows: int, questions: list[str]) -> float:
    """Of a sample of rows, between the file's scores and the model's own.

    Raises:
        RuntimeError: a row is missing, doubled or out of order.
    """
    table = pa.parquet.read_table(output)
    if not np.array_equal(table["id"].to_numpy(), np.arange(rows)):
        raise RuntimeError(f"{output.name} does not have every row once and in order")
    predictor = Predictor(str(folder), calibration=[texts_of(0, CALIBRATION, questions)])
    sample = np.random.default_rng(0).choice(rows, min(CHECKED, rows), replace=False).tolist()
    texts = [text for row in sample for text in texts_of(row, row + 1, questions)]
    found = np.asarray(table.take(sample)["scores"].to_pylist())
    return float(np.abs(found - torch.as_tensor(predictor(texts)).softmax(-1).numpy()).max())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.million", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=suite_file("million"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    questions = list(load_task("questions").train["text"])
    with tempfile.TemporaryDirectory() as name:
        folder, texts, output = (
            Path(name) / part for part in ("model", "in.parquet", "out.parquet")
        )
        (twin,) = (
            model
            for form, model in stored_twins(dense_model(1), [SIZE], 1).items()
            if form.startswith("structured")
        )
        save(twin, load_tokenizer("all-MiniLM-L6-v2"), folder)
        write_texts(texts, options.rows, questions)
        start = "from bert_decomp.cli.main import entry; entry()"
        line = [sys.executable, "-c", start, "predict", str(folder), str(texts), "--int8"]
        line += ["--output", str(output), "--keep_columns", "id", "--processes", "2"]
        parts = output.with_name(f"{output.name}.parts")
        windows = -(-options.rows // WINDOW_ROWS)
        runs = [
            run(line, parts, None if share is None else int(share * windows))
            for share in (*KILLED_AT, None)
        ]
        difference = largest_difference(output, folder, options.rows, questions)
        size = output.stat().st_size
    seconds = sum(one["seconds"] for one in runs)
    save_record(
        options.output,
        f"{processor(environment())}-{options.rows}",
        {
            "command": " ".join(["python -m benchmarks.million", *argv]),
            "rows": options.rows,
            "runs": runs,
            "seconds": seconds,
            "rows_a_second": options.rows / seconds,
            "checked": min(CHECKED, options.rows),
            "largest_difference": difference,
            "output_mb": size / 1e6,
            "environment": environment(),
        },
    )
    print(f"{options.rows} rows in {seconds:.0f} s, {options.rows / seconds:.0f} a second")
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
