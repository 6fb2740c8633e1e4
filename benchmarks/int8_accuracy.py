"""What int8 costs in accuracy, engine by engine: ``python -m benchmarks.int8_accuracy [--task movies]``.

Fine-tuned models of a task, dense and as the suite ``units`` decomposes them before any training, in every engine of
benchmarks.engines: accuracy on the held-out texts, and divergence from the dense model in float32. int8 is calibrated
on training texts.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.evaluation.metrics import divergence, metrics_of
from bert_decomp.io.environment import environment

from .engines import DENSE, ENGINES, INPUTS, Form
from .quality.run import Bench
from .records import processor, save_record, suite_file

# Batches of 64 training texts.
CALIBRATION = 4


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8_accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--task", choices=["questions", "movies"], default="questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--units", nargs="+", default=["structured"])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--cache_dir", help="where teachers and statistics are kept")
    parser.add_argument("--output", type=Path, default=suite_file("int8-accuracy"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    logging.getLogger("bert_decomp").setLevel(logging.ERROR)
    disable_progress_bars()
    torch.set_num_threads(1)
    start = environment()
    for seed in options.seeds:
        bench = Bench(options.task, seed, options.cache_dir)
        calibration, held_out = (
            [{name: batch[name] for name in INPUTS} for batch in batches]
            for batches in (bench.examples.calibration[:CALIBRATION], bench.examples.held_out)
        )
        labels = torch.cat([batch["labels"] for batch in bench.examples.held_out]).numpy()
        models = {DENSE: bench.teacher}
        for units in options.units:
            for size in options.sizes:
                model = models[f"{units} {size:g}"] = copy.deepcopy(bench.teacher)
                config = DecompositionConfig(
                    "coupled", "waterfill", encoder_fraction=size, units=units
                )
                decompose_(
                    model,
                    config,
                    statistics=bench.statistics,
                    progress=False,
                    batches=bench.examples.calibration,
                )
        rows, float_blocks = [], {}
        for name, model in models.items():
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                form = Form(model, calibration, Path(folder), threads=1)
                for engine, make in ENGINES.items():
                    run = make(form)
                    logits = torch.cat([run(batch) for batch in held_out])
                    rows.append(
                        {
                            "form": name,
                            "engine": engine,
                            "metrics": metrics_of(logits.numpy(), labels),
                            "divergence": divergence(bench.answers, logits),
                        }
                    )
                    accuracy = 100 * rows[-1]["metrics"]["accuracy"]
                    apart = 1000 * rows[-1]["divergence"]
                    print(
                        f"{seed} {name:18} {engine:18} {accuracy:.1f} %, KL {apart:.1f}", flush=True
                    )
                float_blocks[name] = form.float_blocks
        save_record(
            options.output,
            f"{options.task}-{processor(start)}-{seed}",
            {
                "options": {"units": options.units, "sizes": options.sizes},
                "task": options.task,
                "data": bench.data,
                "seed": seed,
                "examples": len(labels),
                "float_blocks": float_blocks,
                "rows": rows,
                "environment": {
                    **start,
                    **{
                        package: version(package) for package in ("onnxruntime", "openvino", "nncf")
                    },
                },
            },
        )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
