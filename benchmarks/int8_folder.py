"""Size of int8 folders, and what loading them takes: ``python -m benchmarks.int8_folder``.

all-MiniLM-L6-v2, dense and with a quarter of its encoder's weights, as folders in float32, float16 and int8. Each way
to a fused model starts in processes of its own, in turn: float32; float32 calibrated to int8 on 256 questions; the int8
folder. Seconds are medians, without imports; megabytes are the growth of the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset

# Before the memory is read for the first time.
from transformers.models.bert import modeling_bert  # noqa: F401

from bert_decomp import DecompositionConfig, decompose_, fuse_, save
from bert_decomp.cli.command import command
from bert_decomp.data.batches import batches, encode
from bert_decomp.data.demo import MINILM
from bert_decomp.data.task import load_task
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_as_saved, load_tokenizer

from .records import processor, save_record, suite_file

FRACTION, QUESTIONS = 0.25, 256
# Way to a fused model -> the folder that it starts from.
WAYS = {"float32": "float32", "calibrated": "float32", "int8": "int8"}


def calibration() -> list[dict[str, torch.Tensor]]:
    texts = Dataset.from_dict({"text": load_task("questions").train["text"][:QUESTIONS]})
    tokenizer = load_tokenizer(MINILM)
    return batches(encode(texts, tokenizer, 128), tokenizer, 32)


def write(folder: Path) -> list[dict]:
    """The folders of every form below ``folder``, and the megabytes of their weights."""
    rows, tokenizer, batches_ = [], load_tokenizer(MINILM), calibration()
    for form in ("dense", f"{100 * FRACTION:g} %"):
        model = load_as_saved(MINILM).eval()
        if form != "dense":
            decompose_(model, DecompositionConfig(encoder_fraction=FRACTION), batches_)
        save(model, tokenizer, folder / form / "float32")
        save(model.half(), tokenizer, folder / form / "float16")
        model = load_as_saved(str(folder / form / "float32")).eval()
        fuse_(model, dtype="int8", calibration=batches_)
        save(model, tokenizer, folder / form / "int8")
        sizes = {
            kind: (folder / form / kind / "model.safetensors").stat().st_size / 1e6
            for kind in ("float32", "float16", "int8")
        }
        rows.append({"form": form, "megabytes": sizes, "ways": {}})
    return rows


def peak() -> int:
    """Bytes of this process's peak resident memory. The kernel's ``ru_maxrss`` begins with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")
    )


def load(folder: str, way: str) -> None:
    """Print what one way takes in this process."""
    batches_ = calibration()
    before, start = peak(), time.perf_counter()
    model = load_as_saved(folder).eval()
    if way == "calibrated":
        fuse_(model, dtype="int8", calibration=batches_)
    else:
        fuse_(model)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": (peak() - before) / 1e6}))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8_folder", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes for each way")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=suite_file("int8-folder"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.load:
        load(*options.load)
        return
    with tempfile.TemporaryDirectory() as place:
        rows = write(Path(place))
        for row in rows:
            runs: dict[str, list[dict]] = {way: [] for way in WAYS}
            for _ in range(options.repeats):
                for way, kind in WAYS.items():
                    line = [sys.executable, "-m", "benchmarks.int8_folder", "--load"]
                    line += [str(Path(place) / row["form"] / kind), way]
                    done = subprocess.run(line, check=True, capture_output=True, text=True)
                    runs[way].append(json.loads(done.stdout))
            row["ways"] = {
                way: {
                    name: statistics.median(run[name] for run in found)
                    for name in ("seconds", "megabytes")
                }
                for way, found in runs.items()
            }
            print(json.dumps(row))
    found = environment()
    save_record(
        options.output,
        processor(found),
        {
            "command": " ".join(["python -m benchmarks.int8_folder", *argv]),
            "repeats": options.repeats,
            "rows": rows,
            "environment": found,
        },
    )


if __name__ == "__main__":
    sys.exit(command(main))
