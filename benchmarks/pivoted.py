"""Time of the pivoted encoding beside two plain factors and the dense layer: ``python -m benchmarks.pivoted``.

Base-size shapes, float32, one thread, calls taking turns. The pivoted form comes at the plain factors' rank, where it
is smaller, and at the rank where it weighs as much as they do. The result goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bert_decomp.cli.command import command
from bert_decomp.evaluation.latency import median_ratio, take_turns
from bert_decomp.io.environment import environment
from bert_decomp.methods.pivoted import PivotedLinear, pivoted_rank
from lowrank_kernels import LowRankLinear
from lowrank_kernels.env import cpu_name

from .records import save_record, suite_file

SHAPES = ((768, 768), (3072, 768), (768, 3072))


@torch.inference_mode()
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pivoted", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rank", type=int, default=245)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1024], help="tokens a call")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form")
    parser.add_argument("--output", type=Path, default=suite_file("pivoted"))
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for out_features, in_features in SHAPES:
        rank = pivoted_rank(out_features, in_features, options.rank)
        plain = LowRankLinear(in_features, out_features, options.rank)
        forms: dict[str, tuple[int | None, nn.Module]] = {
            "dense": (None, nn.Linear(in_features, out_features)),
            "two factors": (options.rank, plain),
            "pivoted, same rank": (options.rank, PivotedLinear.from_low_rank(plain)),
            "pivoted, same size": (
                rank,
                PivotedLinear.from_low_rank(LowRankLinear(in_features, out_features, rank)),
            ),
        }
        for tokens in options.rows:
            x = torch.randn(tokens, in_features)
            times = take_turns(
                {name: partial(layer, x) for name, (_, layer) in forms.items()}, options.seconds
            )
            rows += [
                {
                    "out_features": out_features,
                    "in_features": in_features,
                    "rows": tokens,
                    "form": name,
                    "rank": kept,
                    "parameters": sum(part.numel() for part in layer.parameters()),
                    "ms": 1e3 * float(np.median(times[name])),
                    "speedup": median_ratio(times["dense"], times[name]),
                }
                for name, (kept, layer) in forms.items()
            ]
            print(
                *(f"{row['form']} {row['speedup']:.2f}x" for row in rows[-len(forms) :]),
                sep=", ",
                flush=True,
            )
    save_record(
        options.output,
        "pivoted",
        {
            "command": " ".join(["python -m benchmarks.pivoted", *argv]),
            "device": cpu_name(),
            "threads": 1,
            "rows": rows,
            "environment": environment(),
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
