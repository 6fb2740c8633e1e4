"""Running a ``Trainer`` so that a run killed at any moment continues from its last whole checkpoint.

On a CPU a step goes through its batch a slice at a time: the gradients are the whole batch's, the memory a slice's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..data.batches import SLICE_TOKENS, slices
from ..io.manifest import verify_manifest, write_manifest

# transformers' label of what has none.
IGNORED = -100


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """``LengthGroupedSampler`` whose order follows from seed and epoch alone.

    The original draws from the global generator when an epoch starts, so a run resumed in the middle of a later epoch
    would see another order than the one it continues with.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar with the loss at its end, in the place of a line of numbers every few steps."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3g}")


def _labelled(inputs: Mapping[str, Tensor]) -> int:
    """How many labels a batch has that count; its examples, if it has none."""
    labels = inputs.get("labels")
    if labels is None or labels.is_floating_point():
        return len(inputs["input_ids"])
    return int((labels != IGNORED).sum())


class ResumableTrainer(Trainer):
    """``Trainer`` that continues from a whole checkpoint with the very batches that an uninterrupted run would see."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(OneLineProgress)
        # Losses here are means over a batch, so Trainer itself must divide them among accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        # Of the batch's labels, those in the slice that is at work.
        self._share = 1.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        parts = slices(inputs, SLICE_TOKENS) if self.args.device.type == "cpu" else [inputs]
        self._look_ahead(parts)
        loss = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            self._share = _labelled(part) / max(_labelled(inputs), 1)
            is_last = index == len(parts) - 1
            # Processes add up their gradients once a step.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        self._share = 1.0
        return loss

    def _look_ahead(self, parts: list[dict[str, Any]]) -> None:
        """Called with the slices of a batch before the first of them goes through the model."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A mean over labels; that of a slice counts as much as the slice has of them."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss * self._share, outputs) if return_outputs else loss * self._share

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochLengthGroupedSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Seal the checkpoint when every process has written its part; only then may older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial=trial)
            write_manifest(Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; newer ones that are half-written or damaged are deleted."""
    steps = {
        path: path.name.rpartition("-")[2]
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    for path in sorted(
        (path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path])
    ):
        if verify_manifest(path):
            return path
        shutil.rmtree(path, ignore_errors=True)
    return None


def fit(trainer: Trainer) -> None:
    """Train to the end, from the last whole checkpoint in the trainer's output folder if there is one."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
