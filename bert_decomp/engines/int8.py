"""``fused-int8``: the inference form with linear layers in 8 bits (``fuse_(model, dtype="int8")``)."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..planning.latency import eager
from ..runtime import fuse_
from ..runtime.int8_blocks import Encoded, calibrated
from ..runtime.linears import aligned
from ..runtime.quantised import Int8Linear
from .engine import Call, Engine


def _part(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    if isinstance(module, nn.GELU):
        # It is part of the product before it.
        return lambda: None
    if not isinstance(module, (nn.Linear, LowRankLinear)):
        return eager(module, inputs)
    (x,) = inputs
    (stored,) = calibrated(x, aligned(module))
    encoded, quantised = Encoded(stored), Int8Linear(stored)
    return lambda: quantised(encoded(x))


def _model(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Call:
    return partial(fuse_(copy.deepcopy(model).eval(), dtype="int8", calibration=[inputs]), **inputs)


ENGINE = Engine(_part, _model, cpu_only=True)
