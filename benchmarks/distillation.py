"""Cost of a distillation step, term by term, against a plain fine-tuning step of the same student, in one process.

    python -m benchmarks.distillation [--model all-MiniLM-L6-v2] [--batch_size 32] [--length 32]

Every step is the whole of it: student forward, teacher forward where a term needs it, the terms, backward and the
optimizer (AdamW). Dropout is off on both sides. Matrices are factored by plain SVD; tokens are random and none is
padding. Each form takes turns with the plain step, so that whatever else the machine does falls on both. Results go to
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.distillation.losses import PRESETS, DistillationConfig
from bert_decomp.distillation.terms import FEATURE_TERMS
from bert_decomp.distillation.trainer import DistillationTrainer
from bert_decomp.evaluation.latency import random_inputs, take_turns
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_model

from .records import save_record, suite_file

PLAIN = DistillationConfig({"task": 1.0})
# Each feature alone beside the logits, whose cost is that of the teacher's forward pass, and the presets.
FORMS = {
    "logits": DistillationConfig({"logits": 1.0}),
    **{name: DistillationConfig({"logits": 1.0, name: 1.0}) for name in FEATURE_TERMS},
    **PRESETS,
}


def step_of(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    config: DistillationConfig,
    folder: str,
    inputs: dict[str, torch.Tensor],
) -> Callable[[], None]:
    """A training step of a copy of ``student`` with these terms, its loss that of the main job's trainer."""
    arguments = TrainingArguments(folder, report_to="none", use_cpu=not torch.cuda.is_available())
    trainer = DistillationTrainer(
        copy.deepcopy(student), arguments, teacher=copy.deepcopy(teacher), distillation=config
    )
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs = {name: value.to(arguments.device) for name, value in inputs.items()}

    def step() -> None:
        trainer.compute_loss(model, dict(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--model",
        default="all-MiniLM-L6-v2",
        help="a model that the main job takes, or bert-base (random)",
    )
    parser.add_argument(
        "--encoder_fraction",
        type=float,
        default=0.477,
        help="share of the encoder's weights that is kept",
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each form")
    parser.add_argument("--output", type=Path, default=suite_file("distillation"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    teacher = (
        AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert"))
        if options.model == "bert-base"
        else load_model(options.model, num_labels=2)
    )
    student = copy.deepcopy(teacher)
    decompose_(
        student,
        DecompositionConfig("svd", "uniform", encoder_fraction=options.encoder_fraction),
        progress=False,
    )
    inputs = {
        **random_inputs(teacher, options.batch_size, options.length),
        "labels": torch.arange(options.batch_size) % teacher.config.num_labels,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in tqdm(FORMS.items(), desc="forms"):
            steps = {
                "plain": step_of(teacher, student, PLAIN, folder, inputs),
                name: step_of(teacher, student, config, folder, inputs),
            }
            times = take_turns(steps, options.seconds, cuda=torch.cuda.is_available())
            # Ratios of neighbouring calls: what slows the machine for a while slows both.
            low, middle, high = np.quantile(
                np.divide(times[name], times["plain"]), (0.2, 0.5, 0.8)
            ).tolist()
            rows.append(
                {
                    "terms": name,
                    "step_ms": 1e3 * float(np.median(times[name])),
                    "plain_step_ms": 1e3 * float(np.median(times["plain"])),
                    "steps": len(times[name]),
                    "ratio": middle,
                    "ratio_q20": low,
                    "ratio_q80": high,
                }
            )
            tqdm.write(
                f"{name:>24}: {rows[-1]['step_ms']:8.1f} ms  {middle:.2f}x of a plain step ({low:.2f} to {high:.2f})"
            )
    save_record(
        options.output,
        f"{options.model}-{options.batch_size}x{options.length}-{options.threads}t",
        {
            "command": " ".join(["python -m benchmarks.distillation", *argv]),
            "environment": environment(),
            "parameters": options.encoder_fraction,
            "rows": rows,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
