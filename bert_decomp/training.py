"""Running a ``Trainer`` so that a run killed at any moment goes on where its last whole checkpoint left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import Trainer


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; half-written ones are deleted.

    ``trainer_state.json`` is the last file that Trainer writes into a checkpoint, so one that reads as JSON marks the
    checkpoint as whole.
    """
    whole = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


def fit(trainer: Trainer) -> None:
    """Train to the end, from the last whole checkpoint in the trainer's output folder if there is one."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
