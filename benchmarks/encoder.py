"""Time a base-size encoder end to end on the CPU: dense, unfused low-rank and fused low-rank, in one process.

    python -m benchmarks.encoder [--model bert-base] [--ranks 245,128] [--batch_size 8] [--length 128]

Weights are random, which changes no time; shapes are those of BERT-base (``bert-base``) or of any model that the main
job takes (``all-mpnet-base-v2``). Results go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from bert_decomp.command import command
from bert_decomp.environment import environment
from bert_decomp.files import write_json
from bert_decomp.measure import measure
from bert_decomp.models import load_config
from bert_decomp.runtime import fuse_
from bert_decomp.selection import select_linears
from lowrank_kernels import LowRankLinear


def low_rank(model: nn.Module, rank: int) -> nn.Module:
    """A copy of ``model`` with random factors of one rank in the place of every encoder matrix."""
    model = copy.deepcopy(model)
    for name, linear in select_linears(model).items():
        model.set_submodule(name, LowRankLinear(linear.in_features, linear.out_features, rank))
    return model.eval()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base")
    parser.add_argument("--ranks", default="245,128")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each form")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    config = AutoConfig.for_model("bert") if options.model == "bert-base" else load_config(options.model)
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    forms: dict[str, tuple[nn.Module, str | None]] = {"dense": (dense, None)}
    for rank in (int(rank) for rank in options.ranks.split(",")):
        student = low_rank(dense, rank)
        forms[f"rank {rank}, unfused"] = (student, "torch")
        forms[f"rank {rank}, fused"] = (fuse_(copy.deepcopy(student)), None)
    timings = measure(forms, [options.batch_size], options.length, seconds=options.seconds, threads=options.threads)
    path = options.output_dir / f"encoder-{options.model}-{options.batch_size}x{options.length}-{options.threads}t.json"
    write_json(path, {"command": " ".join(["python -m benchmarks.encoder", *argv]), "environment": environment(), **timings})
    for row in timings["rows"]:
        print(f"{row['form']:>18}: {row['latency_ms']:8.1f} ms  {row['speedup']:.2f}x")
    print(path)


if __name__ == "__main__":
    sys.exit(command(main))
