"""The CPU kernels against library calls: ``python -m benchmarks.cpu_kernels [--width_factor 2] [--threads 2]``.

The int8 runtime of the dense model and of the plans of the suite ``units`` (see benchmarks.units_time), with random
weights: the same blocks by oneDNN through torch, and in the compiled kernels on every instruction set that can take
their bytes; beside them the runtime in float32. All are timed in alternation in one process, at each batch.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.evaluation.latency import median_ratio, take_turns
from bert_decomp.exporting.formats import Batch, Logits
from bert_decomp.io.environment import environment
from bert_decomp.runtime import fuse_
from bert_decomp.runtime.compiled import CompiledEncoder
from bert_decomp.runtime.encoder import FusedEncoder
from bert_decomp.runtime.quantised import largest_code
from lowrank_kernels import cpu

from .bert import inputs_of
from .engines import DENSE, POINTS, SHAPES
from .records import save_record, suite_file
from .units_time import dense_model, stored_twins

FLOAT, LIBRARY = "float32", "int8, library"


def variants(model: PreTrainedModel, calibration: list[Batch]) -> dict[str, Logits]:
    """The runtime of a model in float32, in int8 by library calls, and in int8 by each level of the kernels."""
    plain = fuse_(copy.deepcopy(model))
    int8 = fuse_(copy.deepcopy(model), dtype="int8", calibration=calibration)
    (encoder,) = (part for part in int8.modules() if isinstance(part, FusedEncoder))

    def run(compiled: CompiledEncoder | None, batch: Batch) -> torch.Tensor:
        encoder.compiled = compiled
        return int8(**batch).logits

    runs: dict[str, Logits] = {
        FLOAT: lambda batch: plain(**batch).logits,
        LIBRARY: partial(run, None),
    }
    for level in cpu.levels():
        if cpu.largest_code(level) >= largest_code():
            compiled = CompiledEncoder(encoder.layers, level)
            runs[f"int8, {level}"] = partial(run, compiled)
    return runs


def measure(
    form: str, runs: dict[str, Logits], point: str, vocabulary: int, seconds: float
) -> list[dict[str, Any]]:
    """Every variant of one form at one batch: times, and speed over float32 and over library calls."""
    batch, tokens = inputs_of(point, vocabulary, "cpu")
    with torch.inference_mode():
        turns: dict[str, Any] = {name: partial(run, batch) for name, run in runs.items()}
        times = take_turns(turns, seconds, least=5, warm=2)
    rows = []
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
        row = {
            **{"form": form, "point": point, "variant": name, "real_tokens": tokens},
            **{"ms": 1e3 * median, "ms_q20": 1e3 * low, "ms_q80": 1e3 * high, "calls": len(values)},
            "over": {rival: median_ratio(times[rival], values) for rival in (FLOAT, LIBRARY)},
        }
        rows.append(row)
        speeds = ", ".join(f"{ratio:.2f}x of {rival}" for rival, ratio in row["over"].items())
        print(f"{point:>7} {form:16} {name:18} {row['ms']:8.2f} ms, {speeds}", flush=True)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--width_factor", type=int, default=1, choices=sorted(SHAPES))
    parser.add_argument("--points", nargs="+", default=list(POINTS))
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant and batch")
    parser.add_argument("--output", type=Path, default=suite_file("cpu-kernels"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    logging.getLogger("bert_decomp").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start, dense = environment(), dense_model(options.width_factor)
    models = {DENSE: dense, **stored_twins(dense, options.sizes, options.width_factor)}
    vocabulary = dense.config.vocab_size
    calibration = [inputs_of(point, vocabulary, "cpu")[0] for point in ("2x64", "16xmix")]
    rows = []
    for form, model in models.items():
        with torch.no_grad():
            runs = variants(model, calibration)
        for point in options.points:
            rows += measure(form, runs, point, vocabulary, options.seconds)
    processor = "_".join([start["cpu"].lower().replace(" ", "_"), *start["cpu_features"]])
    save_record(
        options.output,
        f"{SHAPES[options.width_factor]}-{processor}-{options.threads}t",
        {
            "command": " ".join(["python -m benchmarks.cpu_kernels", *argv]),
            "shape": SHAPES[options.width_factor],
            "threads": options.threads,
            "levels": list(cpu.levels()),
            "rows": rows,
            "environment": start,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
