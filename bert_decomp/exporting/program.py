"""The ``torch-export`` format: a ``.pt2`` file that ``torch.export.load`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .formats import Batch, Format, Logits, one_tensor


def write(
    program: torch.export.ExportedProgram,
    names: list[str],
    path: Path,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Save the program as it was traced."""
    with path.open("wb") as file:
        torch.export.save(program, file)


def load(path: Path, threads: int | None = None) -> Logits:
    """The program as a function of a batch; ``threads`` are torch's own."""
    with path.open("rb") as file:
        program = torch.export.load(file)
    module, count = program.module(), len(program.graph_signature.user_inputs)

    def run(batch: Batch) -> Tensor:
        found = module(*list(batch.values())[:count])
        return found if isinstance(found, Tensor) else one_tensor(found)

    return run


FORMAT = Format("model.pt2", write, load)
