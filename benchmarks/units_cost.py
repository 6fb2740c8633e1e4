"""What preparing units costs: ``python -m benchmarks.units_cost --shape 12x768 [--texts 2000]``.

A random encoder of a shape (layers x width) on random texts of 32 tokens: statistics, from inputs and gradients, into
a file; every unit of every layer with all its options; the auction at a quarter of the weights; the smaller layers;
the drift refit. Seconds by the wall and by the processor of each, and the most memory that the process held during it.
One shape a process, for memory that was freed is not always given back. Statistics and refit grow with the texts, the
rest does not.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.decomposition.drift import refit_
from bert_decomp.decomposition.structure import apply_blocks_, plan_blocks
from bert_decomp.io.environment import environment
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import Statistics, collect_to_file, fitting_layers
from bert_decomp.units import FORMS, layers_of

from .decompose import timed
from .records import save_record, suite_file

# Heads by shape.
SHAPES = {"6x384": 12, "12x768": 12, "24x1024": 16}
TOKENS, BATCH = 32, 64


def peak_gb_since_last() -> float:
    """The most that this process has held since the last call, pages of files included (Linux alone)."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1e6
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    return peak


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.units_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=SHAPES, default="12x768")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--units", choices=FORMS, default="mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=suite_file("units-cost"))
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers, width = map(int, options.shape.split("x"))
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=1000,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=SHAPES[options.shape],
            intermediate_size=4 * width,
            num_labels=6,
        )
    ).eval()
    ids = torch.randint(5, 1000, (options.texts, TOKENS))
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)
    ]
    modules = select_linears(model)
    at_once = fitting_layers(model, modules, ("gradients",))
    result: dict[str, float] = {}

    def note(name: str, seconds: dict[str, float]) -> None:
        peak = peak_gb_since_last()
        result.update(seconds, **{f"{name}_peak_gb": peak})
        print(f"{name}: {seconds[f'{name}_seconds']:.1f} s, peak {peak:.2f} GB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        _, seconds = timed(
            "statistics",
            lambda: collect_to_file(
                path,
                model,
                batches,
                modules,
                needs=("gradients",),
                layers_at_once=at_once,
            ),
        )
        note("statistics", seconds)
        result["statistics_file_gb"] = path.stat().st_size / 1e9
        form = FORMS[options.units]
        with torch.no_grad():
            statistics = Statistics.load(path)
            prepared, seconds = timed("prepare", lambda: layers_of(model, statistics))
            note("prepare", seconds)
            _, seconds = timed(
                "units",
                lambda: [
                    layer.options(unit, form.grid, form.factored)
                    for layer in prepared
                    for unit in form.blocks.values()
                ],
            )
            note("units", seconds)
            plan, seconds = timed("auction", lambda: plan_blocks(prepared, form, 0.25))
            note("auction", seconds)
            student = copy.deepcopy(model)
            _, seconds = timed("apply", lambda: apply_blocks_(student, prepared, plan))
            note("apply", seconds)
            _, seconds = timed(
                "refit", lambda: refit_(student, model, prepared, plan, batches, statistics)
            )
            note("refit", seconds)
    save_record(
        options.output,
        f"{options.shape}-{options.units}-{options.texts}-{options.threads}t",
        {
            "command": " ".join(["python -m benchmarks.units_cost", *argv]),
            "options": {
                name: getattr(options, name) for name in ("shape", "texts", "units", "threads")
            },
            "layers_at_once": at_once,
            **result,
            "environment": environment(),
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
