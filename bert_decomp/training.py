"""Running a ``Trainer`` so that a run killed at any moment goes on where its last whole checkpoint left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """``LengthGroupedSampler`` whose order follows from seed and epoch alone.

    The original draws from the global generator when an epoch starts, so a run resumed in the middle of a later epoch
    would see another order than the one it goes on with.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar with the loss at its end, in the place of a line of numbers every few steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3g}")


class ResumableTrainer(Trainer):
    """``Trainer`` that goes on from a checkpoint with the very batches that an uninterrupted run would see."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(OneLineProgress)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochLengthGroupedSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)


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
