"""What a file format is to ``export``, and the registry of formats: one module of this package each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..extras import EXTRAS

Batch = dict[str, Tensor]
# A batch of token ids -> logits; see ``one_tensor``.
Logits = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Format:
    """How a traced program is written, quantised, and read back.

    Attributes:
        target: the file that is written; the folder, if ``is_folder``, in which case an int8 model has the same file
            names.
        int8_target: the same for an int8 model; None if the format has none.
        data_suffix: what is after the target's name in that of a file beside it that holds weights too large for it.
        float32_only: half precision is written as float32, which holds the same values.
        extra: the extra of this distribution that brings the packages it needs, if it needs any.
        write: (program, names of its inputs, path, names of its outputs = ("logits",)): writes the file, or
            fills the folder, that exists.
        of_model: ``write`` takes (model, path, calibration batches) instead, and what it writes is int8.
        quantise: (path of what ``write`` wrote, path to write to, calibration batches).
        load: (path, threads) -> the model as a function of a batch.
    """

    target: str
    write: Callable[..., None]
    load: Callable[..., Logits]
    of_model: bool = False
    int8_target: str | None = None
    quantise: Callable[[Path, Path, list[Batch]], None] | None = None
    extra: str | None = None
    is_folder: bool = False
    data_suffix: str | None = None
    float32_only: bool = False


# Name -> the module of this package that defines ``FORMAT``; imported when it is asked for.
FORMATS = {
    "onnx": "onnx",
    "openvino": "openvino",
    "optimum": "optimum",
    "torch-export": "program",
    "fused": "fused",
}


def one_tensor(outputs: Sequence[Any]) -> Tensor:
    """All outputs of a model as one tensor: several stand side by side in its last dimension."""
    tensors = [torch.as_tensor(output) for output in outputs]
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, -1)


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: there is none, or a package that it needs is not installed.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    chosen = importlib.import_module(f"{__package__}.{FORMATS[name]}").FORMAT
    needs = EXTRAS[chosen.extra] if chosen.extra else ()
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"{name} needs {' and '.join(missing)}; pip install 'lowrank-bert[{chosen.extra}]'"
        )
    return chosen
