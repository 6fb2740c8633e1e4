"""``torch``: the model as it is. ``fused``: its inference form (see ``runtime``)."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from ..planning.latency import eager
from ..runtime import fuse_
from .engine import Call, Engine


def _fused(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Call:
    return partial(fuse_(copy.deepcopy(model).eval()), **inputs)


TORCH = Engine(eager, lambda model, inputs: partial(model.eval(), **inputs))
FUSED = Engine(eager, _fused)
