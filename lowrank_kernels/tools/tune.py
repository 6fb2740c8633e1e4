"""Measure the rivals on this GPU and write the table that ``backend="auto"`` reads.

    python -m lowrank_kernels.tune                       # BERT-base and BERT-large shapes, bfloat16
    python -m lowrank_kernels.tune --dtype float16 --ranks 64 128 --output my_tables

For each problem two library matmuls, merged and stacked factors and every set of options of every backend (tiles and
splits) are checked against each other and timed, eager and in a CUDA graph. The fastest is written with the times of
all backends. The file is replaced after each problem, so an interrupted run keeps what it measured, and a later run
measures what is missing. The inference form of a model measures its own problems (see ``calibration``): this command is
for tables that serve many models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import calibration, env, tuning
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
    chosen = problems(options.operators, options.rows, options.ranks, getattr(torch, options.dtype))
    try:
        calibration.measure_missing(chosen, device.index, path, budget=options.budget, quick=False)
    except (calibration.MeasuringError, tuning.TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
