"""``onnx``, ``openvino`` and their int8 forms: what ``exporting`` writes, run by ONNX Runtime or OpenVINO."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exporting.export import trace
from ..exporting.formats import Batch, find_format
from ..kinds import kind_of
from .engine import Call


def part(name: str, int8: bool, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """A call of ``module`` in the format called ``name``."""
    batch = {f"x{index}": x for index, x in enumerate(inputs)}
    return _written(name, int8, torch.export.export(module.eval(), inputs), batch)


def model(name: str, int8: bool, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Call:
    """A call of ``model`` in the format called ``name``.

    Raises:
        UserError: it cannot be exported, or a package is missing.
    """
    # A size of 1 would be taken for a constant.
    example = {key: torch.cat([value, value]) for key, value in inputs.items()}
    outputs = kind_of(model).outputs
    return _written(name, int8, trace(model, list(inputs), example), inputs, outputs)


def _written(
    name: str,
    int8: bool,
    program: torch.export.ExportedProgram,
    batch: Batch,
    outputs: tuple[str, ...] = ("result",),
) -> Call:
    chosen = find_format(name)
    # Goes with the call: an engine may read the weights from the file as long as it runs.
    folder = tempfile.TemporaryDirectory()
    place = Path(folder.name)
    if chosen.is_folder:
        for kind in ("exact", "int8"):
            (place / kind).mkdir()
    chosen.write(program, list(batch), place / "exact", outputs)
    if int8 and chosen.quantise is not None:
        # A bar for each of dozens of parts says nothing.
        with redirect_stdout(io.StringIO()):
            chosen.quantise(place / "exact", place / "int8", [batch])
    run = chosen.load(place / ("int8" if int8 else "exact"), torch.get_num_threads())

    def call() -> object:
        assert folder
        return run(batch)

    return call
