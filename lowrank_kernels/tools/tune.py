"""Measure the rivals on this GPU and write the table that ``backend="auto"`` reads.

    python -m lowrank_kernels.tune                       # BERT-base and BERT-large shapes, bfloat16
    python -m lowrank_kernels.tune --dtype float16 --ranks 64 128 --output my_tables

For each problem the two library matmuls, the dense product and every set of options of every backend (tiles and splits)
are checked against each other and timed, eager and in a CUDA graph; the fastest is written with the times of all
backends. The file is replaced after each problem, so an interrupted run keeps what it measured, and a later run
measures what is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from .. import env, rivals, tuning
from ..problem import Problem

OPERATORS = ("linear", "qkv", "ffn", "linear_norm")
# The problems that most of the time goes to come first.
ORDER = ("ffn", "qkv", "linear_norm", "linear")
WIDTHS = ((768, 3072), (1024, 4096))
ROWS = (1, 16, 128, 512, 2048, 4096, 16384, 65536)
RANKS = (256, 128, 64, 96, 192, 384)


def problems(
    chosen: list[str], rows: list[int], ranks: list[int], dtype: torch.dtype
) -> Iterator[Problem]:
    """The problems of BERT layers: FFN, QKV, output + norm, and the linears, both ways round for the backward pass."""
    for width, hidden in WIDTHS:
        shapes = {
            "linear": ((width, width, 0), (width, hidden, 0), (hidden, width, 0)),
            "qkv": ((width, width, 0),),
            "ffn": ((width, width, hidden),),
            "linear_norm": ((width, width, 0), (hidden, width, 0)),
        }
        for rank in ranks:
            for operator in sorted(chosen, key=ORDER.index):
                for inner, outer, neurons in shapes[operator]:
                    for count in rows:
                        yield Problem(operator, count, inner, outer, rank, dtype, neurons)


class Tuner:
    """Measures in a process of its own, which is started again when a candidate leaves the GPU unusable for it."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self._device, self._budget = device, budget
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def fastest(self, problem: Problem) -> tuning.Entry:
        """``rivals.fastest``, without the candidates that break the GPU."""
        broken: list[str] = []
        while True:
            work = self._pool.submit(rivals.fastest, problem, self._device, self._budget, broken)
            try:
                return work.result()
            except (rivals.BrokenGpu, BrokenProcessPool) as error:
                self.close()
                if not isinstance(error, rivals.BrokenGpu):
                    raise
                print(f"\n{problem}: {error} ended in a CUDA error; left out", file=sys.stderr)
                broken.append(error.args[0])
                self._start()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_kernels.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument(
        "--budget", type=float, default=0.02, help="seconds of timing for each candidate"
    )
    parser.add_argument(
        "--output", type=Path, default=tuning.folders()[0], help="folder of the table"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "tuning measures a GPU and torch sees none; without a table two matmuls are used",
            file=sys.stderr,
        )
        return 2
    device = env.device_of_choice()
    gpu = tuning.gpu(device.index)
    path = options.output / tuning.file_name(gpu.name)
    try:
        entries = tuning.measured(path)
    except tuning.TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = problems(options.operators, options.rows, options.ranks, getattr(torch, options.dtype))
    missing = [problem for problem in chosen if tuning.key(problem) not in entries]
    tuner = Tuner(device, options.budget)
    for index, problem in enumerate(missing, 1):
        entry = tuner.fastest(problem)
        entries[tuning.key(problem)] = tuning.entry_as_json(entry, problem.rank)
        tuning.write(path, gpu, env.describe(), entries)
        filled = 30 * index // len(missing)
        print(
            f"\r[{'#' * filled}{'.' * (30 - filled)}] {index}/{len(missing)} {tuning.key(problem)}: "
            f"{entry.eager.backend}, {entry.captured.backend} in a graph      ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    tuner.close()
    print(f"\nwrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
