"""Whether a plan made for a latency has it: ``python -m benchmarks.latency_target TEACHER [--shares 0.4 0.55 0.7]``.

TEACHER is the folder of a fine-tuned dense classifier. Latencies are asked for as shares of what the dense model takes
just before; each plan is made as ``--latency_ms`` makes it, but for the dense model's time, which is given; then it is
applied with real factors and measured again in turns with the dense model. A shared machine's speed changes from one
minute to the next, so
two errors are written: of the milliseconds, in which that change counts, and of the share of the dense model's time, in
which it does not.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.decomposition.search import plan_for_latency
from bert_decomp.engines import find_engine
from bert_decomp.evaluation.latency import median_ratio, random_inputs, take_turns
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_model
from lowrank_kernels.env import cpu_name

from .records import save_record, suite_file


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_target", description=__doc__.splitlines()[0]
    )
    parser.add_argument("teacher", help="folder of a fine-tuned dense classifier")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.4, 0.55, 0.7],
        help="of the dense model's latency",
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank_multiples", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--fused", action="store_true", help="the inference form")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each model and measurement of the planner"
    )
    parser.add_argument(
        "--check_seconds",
        type=float,
        default=10.0,
        help="for each of two models, in the measurement of a plan",
    )
    parser.add_argument("--output", type=Path, default=suite_file("latency-target"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_model(options.teacher).to(device).eval()
    inputs, cuda = random_inputs(teacher, options.batch_size, options.length), device.type == "cuda"
    engine, rows = find_engine("fused" if options.fused else "torch", device), []
    calls = {"dense": engine.model(teacher, inputs)}
    for multiple in options.rank_multiples:
        for share in options.shares:
            with torch.inference_mode():
                dense = 1e3 * float(
                    np.median(take_turns(calls, options.seconds, cuda=cuda)["dense"])
                )
            asked = share * dense
            config = DecompositionConfig(
                "svd",
                rank_multiple=multiple,
                latency_ms=asked,
                latency_batch_size=options.batch_size,
                latency_seq_length=options.length,
            )
            plan = plan_for_latency(
                teacher,
                config,
                None,
                engine=engine,
                seconds=options.seconds,
                dense_ms=dense,
            )
            student = copy.deepcopy(teacher)
            decompose_(student, config, plan=plan, progress=False)
            with torch.inference_mode():
                times = take_turns(
                    calls | {"student": engine.model(student, inputs)},
                    options.check_seconds,
                    cuda=cuda,
                )
            quantiles = {
                f"{form}_ms": dict(
                    zip(
                        ("q20", "q50", "q80"),
                        (1e3 * np.quantile(values, (0.2, 0.5, 0.8))).tolist(),
                        strict=True,
                    )
                )
                for form, values in times.items()
            }
            obtained = median_ratio(times["student"], times["dense"])
            rows.append(
                {
                    "share": share,
                    "rank_multiple": multiple,
                    "asked_ms": asked,
                    **quantiles,
                    "obtained_share": obtained,
                    "obtained_over_asked": quantiles["student_ms"]["q50"] / asked,
                    "obtained_share_over_asked": obtained / share,
                    "encoder_fraction": plan.encoder_fraction,
                    "ranks": {matrix: entry.rank for matrix, entry in plan.matrices.items()},
                }
            )
            print(
                f"{share:g} of dense, multiple {multiple}: {100 * plan.encoder_fraction:.1f} % of the encoder; "
                f"asked {asked:.1f} ms, took {quantiles['student_ms']['q50']:.1f} "
                f"({rows[-1]['obtained_over_asked']:.3f}); share of the dense model's time {obtained:.3f} "
                f"({rows[-1]['obtained_share_over_asked']:.3f})",
                flush=True,
            )
    name = Path(options.teacher).name.rsplit("-", 1)[0]
    save_record(
        options.output,
        f"{name}-{options.batch_size}x{options.length}{'-fused' * options.fused}",
        {
            "environment": environment(),
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "teacher": name,
            "options": {
                key: value
                for key, value in vars(options).items()
                if key not in ("teacher", "output")
            },
            "rows": rows,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
