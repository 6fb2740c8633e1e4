"""What each method makes small, and what the model makes of it: ``python -m benchmarks.method_errors [--task movies]``.

The encoder is cut to one size by every method, without training. Of each matrix: the error of its weight, of its
output, and of the loss as gradients foresee it; of the model: how far its answers move. The result, from which
docs/concepts/methods.md argues, goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import divergence
from bert_decomp.io.environment import environment
from bert_decomp.methods import METHODS
from bert_decomp.planning import plan_ranks
from bert_decomp.statistics import LayerStatistics
from lowrank_kernels import LowRankLinear

from .quality.run import Bench
from .records import save_record, suite_file


def errors(
    dense: nn.Linear, layer: LowRankLinear, about: LayerStatistics, price: float
) -> dict[str, float]:
    """Of one matrix: |D|^2 / |W|^2, E|D x + d|^2 over the variance of W x, and price E[|g|^2 ...] (see ``coupled``)."""
    difference = (dense.weight - layer.up @ layer.down).double()
    offset = (dense.bias - layer.bias).double()
    weight, inputs, gradients = dense.weight.double(), about.inputs, about.gradients

    def expected(covariance: Tensor, mean: Tensor, outputs: Tensor | None = None) -> float:
        moved = difference @ mean + offset
        moment = difference @ covariance @ difference.T + torch.outer(moved, moved)
        return float(moment.trace() if outputs is None else (outputs * moment).sum())

    return {
        "weight": float(difference.square().sum() / weight.square().sum()),
        "output": expected(inputs.covariance, inputs.mean)
        / float((weight @ inputs.covariance * weight).sum()),
        "loss": price
        * expected(
            gradients.input_covariance, gradients.input_mean, gradients.relative_second_moment
        ),
    }


@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method_errors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--task", default="questions")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--size", type=float, default=0.25, help="share of the encoder's weights")
    parser.add_argument("--cache_dir", help="where teachers and statistics are kept")
    parser.add_argument("--output", type=Path, default=suite_file("method-errors"))
    options = parser.parse_args(argv)
    bench = Bench(options.task, options.seed, options.cache_dir)
    prices, rows = bench.statistics.energies(), []
    allocations = [
        *((method, "uniform") for method in METHODS),
        ("whiten", "waterfill, unweighted"),
        ("whiten", "waterfill"),
        ("coupled", "waterfill, unweighted"),
        ("coupled", "waterfill"),
    ]
    for method, allocation in tqdm(allocations, desc="methods"):
        # The allocation sensitivity is water-filling with weights of one's own: here all alike.
        config = DecompositionConfig(
            method,
            "sensitivity" if "unweighted" in allocation else allocation,
            encoder_fraction=options.size,
        )
        plan = plan_ranks(bench.teacher, config, bench.statistics, dict.fromkeys(prices, 1.0))
        ranks = [entry.rank for entry in plan.matrices.values()]
        if None in ranks:
            raise UserError(
                f"at {options.size:g} of the encoder {method} leaves matrices dense, which have no error; give a "
                "smaller --size"
            )
        student = copy.deepcopy(bench.teacher)
        decompose_(student, config, statistics=bench.statistics, plan=plan, progress=False)
        layers = {
            name: errors(
                bench.teacher.get_submodule(name),
                student.get_submodule(name),
                bench.statistics.of(name),
                price,
            )
            for name, price in prices.items()
        }
        answers, metrics = bench.evaluate(student)
        row: dict[str, Any] = {
            "method": method,
            "allocation": allocation,
            "encoder_fraction": plan.encoder_fraction,
            "smallest_rank": min(ranks),
            "largest_rank": max(ranks),
            "weight": statistics.mean(entry["weight"] for entry in layers.values()),
            "output": statistics.mean(entry["output"] for entry in layers.values()),
            "loss": sum(entry["loss"] for entry in layers.values()),
            "divergence": divergence(bench.answers, answers),
            "metrics": metrics,
        }
        rows.append(row)
        tqdm.write(
            ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
            )
        )
    save_record(
        options.output,
        bench.name,
        {
            "options": {"seed": options.seed, "size": options.size},
            "task": options.task,
            "data": bench.data,
            "teacher": bench.metrics,
            "rows": rows,
            "environment": environment(),
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
