"""Our runtime against the engines that users have: ``python -m benchmarks.engines [--width_factor 2]``.

The dense model and the plans of the suite ``units`` (see benchmarks.units_time), with random weights, in torch, in the
fused runtime, in ONNX Runtime and in OpenVINO, in float32 and int8. Every pair of a form and an engine is one variant.
All variants are timed in alternation in one process on the same padded batches, of which only the fused runtime drops
the padding. Before any is timed, its logits are compared with torch's.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.errors import UserError
from bert_decomp.evaluation.latency import median_ratio, take_turns
from bert_decomp.exporting.export import TOLERANCE, difference, trace
from bert_decomp.exporting.formats import Batch, Logits, find_format
from bert_decomp.io.environment import environment
from bert_decomp.runtime import fuse_
from bert_decomp.runtime.encoder import FusedEncoder

from .encoders import inputs_of
from .records import processor, save_record, suite_file
from .units_time import dense_model, stored_twins

POINTS = ("1x32", "8x128", "32xmix")
DENSE = "dense"
INPUTS = ["input_ids", "attention_mask"]
SHAPES = {1: "minilm", 2: "bert-base"}


class Form:
    """One model on its way into every engine: traced once, written once to each file format and precision.

    Args:
        model: on the CPU, in evaluation mode.
        calibration: batches that int8 is calibrated on.
        folder: where the files go.
        threads: of every engine.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: list[Batch], folder: Path, threads: int
    ):
        self.model, self.calibration, self.folder = model, calibration, folder
        self.threads = threads
        self.float_blocks: list[str] = []

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        return trace(self.model, INPUTS, self.calibration[-1])

    def eager(self) -> Logits:
        return lambda batch: self.model(**batch).logits

    def fused(self, dtype: str | None) -> Logits:
        # Weights are shared with the model; the fused form packs its own copies where it needs some.
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        fused = fuse_(copy.deepcopy(self.model, shared), dtype=dtype, calibration=self.calibration)
        if dtype is not None:
            (encoder,) = (part for part in fused.modules() if isinstance(part, FusedEncoder))
            self.float_blocks = sorted(encoder.quality.exact)
        return lambda batch: fused(**batch).logits

    def exported(self, name: str, int8: bool) -> Logits:
        chosen = find_format(name)
        plain, quantised = (self.folder / f"{name}-{kind}" for kind in ("fp32", "int8"))
        if chosen.is_folder:
            plain.mkdir(exist_ok=True), quantised.mkdir(exist_ok=True)
        if not int8:
            chosen.write(self.program, INPUTS, plain)
            return chosen.load(plain, self.threads)
        assert chosen.quantise is not None
        chosen.quantise(plain, quantised, self.calibration)
        return chosen.load(quantised, self.threads)


# Engine -> a form in it. The float32 file of a format is written before its int8 one is made of it.
ENGINES: dict[str, Callable[[Form], Logits]] = {
    "torch fp32": Form.eager,
    "fused fp32": partial(Form.fused, dtype=None),
    "fused int8": partial(Form.fused, dtype="int8"),
    "ONNX Runtime fp32": partial(Form.exported, name="onnx", int8=False),
    "ONNX Runtime int8": partial(Form.exported, name="onnx", int8=True),
    "OpenVINO fp32": partial(Form.exported, name="openvino", int8=False),
    "OpenVINO int8": partial(Form.exported, name="openvino", int8=True),
}


def prepare(
    name: str, form: Form, checks: list[Batch]
) -> tuple[dict[tuple[str, str], Logits], list[dict[str, Any]]]:
    """A form in every engine, by (form, engine), and how far each engine's logits are from torch's.

    Raises:
        UserError: float32 logits differ by more than rounding.
    """
    runs, differences = {}, []
    for engine, make in ENGINES.items():
        run = runs[name, engine] = make(form)
        worst, _ = difference(run, form.model, checks)
        if not np.isfinite(worst) or (worst > TOLERANCE and "fp32" in engine):
            raise UserError(f"{name} in {engine}: logits are {worst:.1e} away from torch's")
        differences.append({"form": name, "engine": engine, "difference_from_torch": worst})
        print(f"{name:18} {engine:18} ready, {worst:.1e} from torch", flush=True)
    return runs, differences


def measure_point(
    runs: dict[tuple[str, str], Logits], point: str, vocabulary: int, seconds: float, least: int
) -> list[dict[str, Any]]:
    """Every variant at one point: times, and speed over the dense model in every engine."""
    batch, tokens = inputs_of(point, vocabulary, "cpu")
    with torch.inference_mode():
        times = take_turns(
            {key: partial(run, batch) for key, run in runs.items()}, seconds, least=least, warm=1
        )
    rows = []
    for (form, engine), values in times.items():
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
        rows.append(
            {
                "point": point,
                "form": form,
                "engine": engine,
                "ms": 1e3 * median,
                "ms_q20": 1e3 * low,
                "ms_q80": 1e3 * high,
                "calls": len(values),
                "real_tokens": tokens,
                "over_dense": {
                    rival: median_ratio(times[DENSE, rival], values) for rival in ENGINES
                },
            }
        )
        print(
            f"{point:>7} {form:18} {engine:18} {rows[-1]['ms']:8.1f} ms, over dense: "
            + ", ".join(
                f"{rows[-1]['over_dense'][rival]:.2f}x of {rival}"
                for rival in ("torch fp32", "OpenVINO int8")
            ),
            flush=True,
        )
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--width_factor", type=int, default=1, choices=sorted(SHAPES))
    parser.add_argument(
        "--points", nargs="+", default=list(POINTS), help="batch x length, or batch x mix"
    )
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.25, 0.125], help="shares of the encoder"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant and point")
    parser.add_argument("--least", type=int, default=5, help="calls of each variant and point")
    parser.add_argument("--output", type=Path, default=suite_file("engines"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    logging.getLogger("bert_decomp").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = dense_model(options.width_factor)
    models = {DENSE: dense, **stored_twins(dense, options.sizes, options.width_factor)}
    vocabulary = dense.config.vocab_size
    # Lengths below and above the mix's, and padding; the last is large enough to trace.
    calibration = [inputs_of(point, vocabulary, "cpu")[0] for point in ("2x64", "8x128", "16xmix")]
    runs, differences, float_blocks = {}, [], {}
    start = environment()
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, model) in enumerate(models.items()):
            place = Path(folder) / str(index)
            place.mkdir()
            form = Form(model, calibration, place, options.threads)
            with torch.no_grad():
                own, checked = prepare(name, form, calibration)
            runs.update(own)
            differences += checked
            float_blocks[name] = form.float_blocks
        rows = [
            row
            for point in options.points
            for row in measure_point(runs, point, vocabulary, options.seconds, options.least)
        ]
    save_record(
        options.output,
        f"{SHAPES[options.width_factor]}-{processor(start)}-{options.threads}t",
        {
            "command": " ".join(["python -m benchmarks.engines", *argv]),
            "shape": SHAPES[options.width_factor],
            "threads": options.threads,
            "differences": differences,
            # Blocks that the int8 runtime left in float32, by form.
            "float_blocks": float_blocks,
            "rows": rows,
            "environment": {
                **start,
                **{package: version(package) for package in ("onnxruntime", "openvino", "nncf")},
            },
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
