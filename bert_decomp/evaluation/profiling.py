"""Where a forward pass spends its time: query-key-value, attention, output, feed-forward, norms, and the rest.

torch's profiler says how long each operator took; what part of a layer an operator belongs to is known from the module
inside which it was called (hooks mark linear layers and the blocks of the inference form), or from the operator's own
name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..models.architectures import FAMILIES, encoder_layers

PARTS = ("QKV", "attention", "output", "FFN", "norms", "rest")
# Linear layers of an encoder layer -> part.
LINEARS = {
    "query": "QKV",
    "key": "QKV",
    "value": "QKV",
    "attention_output": "output",
    "ffn_intermediate": "FFN",
    "ffn_output": "FFN",
}
# Blocks of a fused encoder layer -> part.
BLOCKS = {"query_key_value": "QKV", "attention_output": "output", "feed_forward": "FFN"}
NORM = r"aten::(native_)?layer_norm$"
# Operators outside any linear layer -> part. The fused output projection ends with its norm, which is counted with it.
OPERATORS = {
    r"lowrank_kernels::qkv": "QKV",
    r"lowrank_kernels::linear_norm": "output",
    r"lowrank_kernels::ffn": "FFN",
    r"aten::(gelu|relu|silu)_?$": "FFN",
    NORM: "norms",
    r"aten::(_?scaled_dot_product|_flash|_efficient|_?softmax|matmul|bmm|baddbmm)|varlen": "attention",
}
_MARK, _PASS = "part:", "forward pass"


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Every linear layer of the encoder, and every block of its inference form, announces its part while it runs."""
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    handles, open_marks = [], []

    def enter(part: str) -> Any:
        def hook(*_: Any) -> None:
            open_marks.append(record_function(_MARK + part).__enter__())

        return hook

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for layer in encoder_layers(model).values():
        modules = dict(layer.named_modules())
        names = {
            name: part
            for role, part in LINEARS.items()
            if (name := getattr(family, role, role)) in modules
        } | {name: part for name, part in BLOCKS.items() if name in modules}
        for name, part in names.items():
            handles += [
                modules[name].register_forward_pre_hook(enter(part)),
                modules[name].register_forward_hook(leave),
            ]

    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part(chain: list[str]) -> str:
    """The part of an operator, from its name and those of what called it, innermost first."""
    if any(re.match(NORM, name) for name in chain):
        return "norms"
    marked = next((name for name in chain if name.startswith(_MARK)), None)
    if marked is not None:
        return marked.removeprefix(_MARK)
    return next(
        (part for name in chain for pattern, part in OPERATORS.items() if re.match(pattern, name)),
        "rest",
    )


@torch.no_grad()
def operators_by_part(
    model: nn.Module, inputs: dict[str, Tensor], passes: int
) -> list[tuple[str, str, float]]:
    """Every operator that ran in some forward passes: its name, its part, and the microseconds that it took itself (the
    device's time on a GPU)."""
    cuda = inputs["input_ids"].is_cuda
    # The profiler's library announces every start and stop on standard error unless told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    model(**inputs)
    with (
        _marked(model),
        profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler,
    ):
        for _ in range(passes):
            with record_function(_PASS):
                model(**inputs)
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in profiler.events():
        chain = [event]
        while chain[-1].cpu_parent is not None:
            chain.append(chain[-1].cpu_parent)
        if chain[-1].name == _PASS:
            found.append(
                (
                    event.name,
                    _part([one.name for one in chain]),
                    event.self_device_time_total if cuda else event.self_cpu_time_total,
                )
            )
    return found


def time_split(model: nn.Module, inputs: dict[str, Tensor], passes: int = 3) -> dict[str, float]:
    """Share of a forward pass that each of ``PARTS`` takes, by the profiler: the device's time, or on a CPU the
    operators' time, where the time between operators counts as rest. The shares sum to 1."""
    spent = dict.fromkeys(PARTS, 0.0)
    for _, part, microseconds in operators_by_part(model, inputs, passes):
        spent[part] += microseconds
    return {part: spent[part] / sum(spent.values()) for part in PARTS}
