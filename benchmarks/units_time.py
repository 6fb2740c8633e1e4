"""What units cost in time: ``python -m benchmarks.units_time [--width_factor 2]``.

The plans of the suite ``units`` (benchmarks/results/units.jsonl) with random weights, in torch float32, unfused and
fused, in turns with the dense model. With a width factor of 2 the encoder and every size of the plans are doubled:
BERT-base's shapes from those of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.decomposition.blocks_latency import random_blocks_twin
from bert_decomp.decomposition.search import random_twin
from bert_decomp.errors import UserError
from bert_decomp.evaluation.latency import median_ratio, random_inputs, take_turns
from bert_decomp.io.environment import environment
from bert_decomp.models.architectures import FAMILIES, encoder_layers
from bert_decomp.planning import MatrixPlan, RankPlan
from bert_decomp.planning.blocks import BlockPlan, LayerPlan
from bert_decomp.runtime import fuse_
from bert_decomp.units import sizes_of

from .records import read_suite, save_record, suite_file

EXPERIMENTS = ("matrices", "structured", "mixed")


def dense_model(factor: int) -> BertForSequenceClassification:
    """all-MiniLM-L6-v2's encoder, or one with ``factor`` times its layers, width, and sizes of heads and neurons."""
    config = BertConfig(
        num_hidden_layers=6 * factor,
        hidden_size=384 * factor,
        num_attention_heads=12,
        intermediate_size=1536 * factor,
        num_labels=6,
    )
    return BertForSequenceClassification(config).eval()


def _twin(
    model: BertForSequenceClassification, record: dict[str, Any], factor: int
) -> PreTrainedModel:
    """``model`` with the sizes that a record of the suite kept, times ``factor``; a layer counts ``factor`` times."""
    sizes, names = sizes_of(model), list(encoder_layers(model))
    if "ranks" in record:
        matrices: dict[str, MatrixPlan] = {}
        for index, name in enumerate(names):
            for part in dict.fromkeys(vars(FAMILIES["bert"]).values()):
                rank = record["ranks"].get(f"bert.encoder.layer.{index // factor}.{part}", 0)
                if rank == 0:
                    continue
                linear = model.get_submodule(f"{name}.{part}")
                matrices[f"{name}.{part}"] = MatrixPlan(
                    linear.in_features, linear.out_features, None if rank is None else rank * factor
                )
        return random_twin(model, RankPlan(matrices))
    layers = list(record["layers"].values())
    plans = {}
    for index, name in enumerate(names):
        layer = LayerPlan(**layers[index // factor])
        plans[name] = replace(
            layer,
            heads=tuple(layer.heads),
            score_size=factor * layer.score_size,
            value_size=factor * layer.value_size,
            neurons=factor * layer.neurons,
            ranks={part: factor * rank for part, rank in layer.ranks.items()},
        )
    return random_blocks_twin(model, BlockPlan(sizes, plans))


def stored_twins(
    model: BertForSequenceClassification, sizes: list[float], factor: int
) -> dict[str, PreTrainedModel]:
    """``model`` by every experiment at every size (shares of the encoder) as the suite planned it, weights random.

    Raises:
        UserError: the suite has no such plan.
    """
    records, result = {record["name"]: record for record in read_suite("units")}, {}
    for experiment in EXPERIMENTS:
        for size in sizes:
            name = f"{experiment}/questions-42-{size:g}-before"
            if name not in records:
                raise UserError(f"benchmarks/results/units.jsonl has no {name}; make it first")
            result[f"{experiment} {size:g}"] = _twin(model, records[name], factor)
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.units_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--width_factor", type=int, default=1, choices=(1, 2))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each form")
    parser.add_argument("--output", type=Path, default=suite_file("units-time"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    model = dense_model(options.width_factor)
    forms: dict[str, nn.Module] = {"dense": model, "dense, fused": fuse_(copy.deepcopy(model))}
    for name, twin in stored_twins(model, options.sizes, options.width_factor).items():
        forms[name] = twin
        forms[f"{name}, fused"] = fuse_(copy.deepcopy(twin))
    inputs = random_inputs(model, options.batch_size, options.length)
    with torch.inference_mode():
        times = take_turns(
            {name: partial(form, **inputs) for name, form in forms.items()}, options.seconds
        )
    rows = [
        {
            "form": name,
            "ms": 1e3 * float(np.median(values)),
            "speed_over_dense": 1 / median_ratio(values, times["dense"]),
            "speed_over_dense_fused": 1 / median_ratio(values, times["dense, fused"]),
        }
        for name, values in times.items()
    ]
    save_record(
        options.output,
        f"x{options.width_factor}-{options.batch_size}x{options.length}-{options.threads}t",
        {
            "width_factor": options.width_factor,
            "batch_size": options.batch_size,
            "length": options.length,
            "threads": options.threads,
            "options": {"sizes": options.sizes},
            "rows": rows,
            "environment": environment(),
        },
    )
    for row in rows:
        print(
            f"{row['form']:26} {row['ms']:8.2f} ms  {row['speed_over_dense']:.2f}x of dense, "
            f"{row['speed_over_dense_fused']:.2f}x of dense fused"
        )


if __name__ == "__main__":
    sys.exit(command(main))
