"""The ``torch-export`` format: a ``.pt2`` file that ``torch.export.load`` reads."""

from __future__ import annotations

from pathlib import Path

import torch

from .formats import Format, Logits


def write(
    program: torch.export.ExportedProgram, names: list[str], path: Path, output: str = "logits"
) -> None:
    """Save the program as it was traced."""
    with path.open("wb") as file:
        torch.export.save(program, file)


def load(path: Path, threads: int | None = None) -> Logits:
    """The program as a function of a batch; ``threads`` are torch's own."""
    with path.open("rb") as file:
        program = torch.export.load(file)
    module, count = program.module(), len(program.graph_signature.user_inputs)
    return lambda batch: module(*list(batch.values())[:count])


FORMAT = Format("model.pt2", write, load)
