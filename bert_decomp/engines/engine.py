"""What an engine is to the search for a latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..planning.latency import Prepare

# A call that takes the time to be measured.
Call = Callable[[], object]


@dataclass(frozen=True)
class Engine:
    """``part`` makes a call of a module on its inputs; ``model`` one of a dense or decomposed model, which it leaves as
    it is, on a batch of ``input_ids`` and ``attention_mask`` (batch, tokens). ``format``: that of the files that it
    reads, if it reads any."""

    part: Prepare
    model: Callable[[PreTrainedModel, dict[str, Tensor]], Call]
    cpu_only: bool = False
    format: str | None = None
