"""Engines that a latency can be asked for. Each says how it runs a whole model, and the parts of a layer from which a
table of times is made (``planning.costs``); everything else about a latency is the same for all of them.

An engine is a file of this package and its row in ``ENGINES``.
"""

from __future__ import annotations

from functools import partial

import torch

from ..errors import UserError
from ..exporting.formats import find_format
from . import exported, int8
from .eager import FUSED, TORCH
from .engine import Engine

__all__ = ["ENGINES", "TORCH", "Engine", "find_engine"]

ENGINES: dict[str, Engine] = {
    "torch": TORCH,
    "fused": FUSED,
    "fused-int8": int8.ENGINE,
    **{
        f"{name}{'-int8' if quantised else ''}": Engine(
            partial(exported.part, name, quantised),
            partial(exported.model, name, quantised),
            cpu_only=True,
            format=name,
        )
        for name in ("onnx", "openvino")
        for quantised in (False, True)
    },
}


def find_engine(name: str, device: torch.device) -> Engine:
    """The engine called ``name``, for a model on ``device``.

    Raises:
        UserError: there is none, it does not run there, or a package that it needs is missing.
    """
    if name not in ENGINES:
        raise UserError(f"unknown latency_engine {name!r}; choose one of {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if engine.cpu_only and device.type == "cuda":
        raise UserError(f"the latency_engine {name} runs on the CPU; move the model there")
    if engine.format is not None:
        find_format(engine.format)
    return engine
