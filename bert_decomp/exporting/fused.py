"""The ``fused`` format, int8 alone: a folder that ``from_pretrained``, ``predict`` and ``serve`` run in int8.

In floating point nothing needs to be written: any saved model is fused when it is loaded.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel

from ..kinds import kind_of
from ..models.loading import load_as_saved
from ..runtime import fuse_
from .formats import Batch, Format, Logits


def load(path: Path, threads: int | None = None) -> Logits:
    """The folder's model as a function of a batch."""
    model = load_as_saved(str(path)).eval()
    return lambda batch: kind_of(model).raw(model(**batch))


def write(model: PreTrainedModel, path: Path, batches: list[Batch]) -> None:
    """Write the int8 form of ``model``, calibrated on ``batches``."""
    fuse_(copy.deepcopy(model), dtype="int8", calibration=batches).save_pretrained(path)


FORMAT = Format(
    target="fused-int8",
    int8_target="fused-int8",
    write=write,
    load=load,
    of_model=True,
    is_folder=True,
)
