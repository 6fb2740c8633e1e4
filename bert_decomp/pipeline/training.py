"""transformers' training arguments with this project's defaults."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .options import TrainingDefaults, option


@dataclass
class RunTrainingArguments(TrainingDefaults, TrainingArguments):
    """All of transformers' training arguments; the fields of ``TrainingDefaults`` replace those of the same name."""

    dataloader_pin_memory: bool = option(
        torch.cuda.is_available(), "Pin host memory while loading batches."
    )
