"""The ``optimum`` format: a folder with ``model.onnx``, its configuration and its tokenizer.

Names are those that optimum-onnx (``ORTModelForSequenceClassification``), sentence-transformers
(``backend="onnx"``) and text-embeddings-inference read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import onnx
from .formats import Batch, Format, Logits

FILE = "model.onnx"


def write(
    program: torch.export.ExportedProgram,
    names: list[str],
    path: Path,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Put ``model.onnx`` into the folder ``path``; see ``onnx.write``."""
    onnx.write(program, names, path / FILE, outputs)


def load(path: Path, threads: int = 1) -> Logits:
    """The folder's model as a function of a batch, run by onnxruntime on the CPU."""
    return onnx.load(path / FILE, threads)


def quantise(source: Path, path: Path, batches: list[Batch]) -> None:
    """int8 weights, and activations quantised as they come."""
    onnx.quantise(source / FILE, path / FILE, batches)


FORMAT = Format(
    "optimum",
    write,
    load,
    int8_target="optimum-int8",
    quantise=quantise,
    extra="export",
    is_folder=True,
)
