"""What is foreseen of a cut of the word embedding and of the encoder, and what happens: ``python -m
benchmarks.embedding_loss [--task movies]``.

Each is cut alone, without training, to several sizes. Where both foresee the same loss the answers should move as far,
or an auction over both spends on the wrong one.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.evaluation.metrics import divergence
from bert_decomp.io.environment import environment
from bert_decomp.methods.embedding import expected_frequency
from bert_decomp.planning import RankPlan, RankProblem, plan_ranks
from bert_decomp.planning.allocate import dense_plan

from .quality.run import Bench
from .records import save_record, suite_file

FRACTIONS = (0.125, 0.1875, 0.25, 0.375, 0.5)
RANKS = (48, 72, 96, 128, 160, 224, 288)


def counts(batches: list[dict[str, torch.Tensor]], vocabulary: int) -> torch.Tensor:
    """How often each token stands in ``batches``, float64."""
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return ids.bincount(minlength=vocabulary).double()


@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedding_loss",
        description="Foreseen and measured losses of the word embedding and of the encoder.",
    )
    parser.add_argument("--task", default="questions")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--cache_dir", help="where teachers and statistics are kept")
    parser.add_argument("--output", type=Path, default=suite_file("embedding-loss"))
    options = parser.parse_args(argv)
    bench = Bench(options.task, options.seed, options.cache_dir)
    bench.with_embedding()
    config = DecompositionConfig(model_fraction=0.5)
    problem = RankProblem.of(bench.teacher, config)
    embedding, shapes = problem.embedding, problem.shapes
    offers = {entry.rank: entry for entry in embedding.offers(bench.statistics)}
    plans: list[tuple[str, float, RankPlan]] = [
        (
            "encoder",
            size,
            plan_ranks(bench.teacher, DecompositionConfig(encoder_fraction=size), bench.statistics),
        )
        for size in FRACTIONS
    ]
    for rank in RANKS:
        plan = RankPlan(dense_plan(shapes).matrices, {embedding.name: offers[rank]})
        plans.append(("embedding", rank, plan))
    rows: list[dict[str, Any]] = []
    for part, size, plan in tqdm(plans, desc="cuts"):
        student = copy.deepcopy(bench.teacher)
        decompose_(student, config, statistics=bench.statistics, plan=plan, progress=False)
        answers, metrics = bench.evaluate(student)
        row = {
            "part": part,
            "size": size,
            "expected_loss": plan.expected_loss,
            "divergence": divergence(bench.answers, answers),
            "metrics": metrics,
        }
        rows.append(row)
        tqdm.write(f"{part} {size:g}: {row['expected_loss']:.3g} {1000 * row['divergence']:.1f}")
    vocabulary = embedding.module.num_embeddings
    known, other = (
        counts(batches, vocabulary)
        for batches in (bench.examples.calibration, bench.examples.held_out)
    )
    save_record(
        options.output,
        bench.name,
        {
            "options": {"seed": options.seed},
            "task": options.task,
            "data": bench.data,
            "teacher": bench.metrics,
            "rows": rows,
            "unseen": {
                "expected": float(expected_frequency(known)[known == 0].sum()),
                "held_out": float(other[known == 0].sum() / other.sum()),
            },
            "environment": environment(),
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
