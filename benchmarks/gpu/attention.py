"""Attention by heads of the sizes that units leave: every tile against library calls, and against float64.

Queries, keys and values are views of one matrix, as the runtime has them. A line holds the microseconds at one batch
and one kind of heads, in graph replays and of eager calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.encoders import inputs_of
from bert_decomp.runtime.sequences import pack
from lowrank_kernels import env, measure
from lowrank_kernels.reference.attention import attention as by_library
from lowrank_kernels.reference.attention import varlen_for
from lowrank_kernels.triton_backend.attention import AttentionPlan
from lowrank_kernels.triton_backend.tiles import attention_space

from .results import Setting, relative_error

# Heads, and the size of each one's scores and values: BERT-base's, then what plans of units kept of them.
HEADS = ((12, 64, 64), (8, 32, 48), (4, 16, 32), (6, 8, 16), (12, 48, 40), (3, 16, 16))


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure the sizes that are not known yet, until it is late."""
    known = setting.results.known()
    for point, heads in itertools.product(setting.points, HEADS):
        key = f"attention/{point}/{'x'.join(map(str, heads))}"
        if key not in known:
            if setting.late(3):
                return
            setting.results.add(key, **_measured(setting, point, *heads))


def _measured(
    setting: Setting, point: str, heads: int, of_score: int, of_value: int
) -> dict[str, Any]:
    device = env.device_of_choice()
    mask = inputs_of(point, 100, str(device))[0]["attention_mask"].bool()
    packed = pack(mask)
    assert packed is not None
    widths = [heads * of_score, heads * of_score, heads * of_value]
    x = torch.randn(int(mask.sum()), sum(widths), device=device).to(getattr(torch, setting.dtype))
    where = packed.where(x, x)

    def by(function: Callable[..., tuple[Tensor, Any, Any]], one: Tensor, **rest: Any) -> Tensor:
        return function(*one.split(widths, 1), *where, **rest)[0]

    query, _, value = x.split(widths, 1)
    library = "padded" if varlen_for(query, value) is None else "varlen"
    calls: dict[str, Callable[[Tensor], Tensor]] = {library: partial(by, by_library, heads=heads)}
    if mask.all() and library == "padded":
        calls["one length"] = lambda one: packed.attention(*one.split(widths, 1), heads)
    tiles = attention_space(packed.longest, max(of_score, of_value))
    names = [f"tile {tile.block_m}x{tile.block_n}, {tile.warps} warps" for tile in tiles]
    for name, tile in zip(names, tiles, strict=True):
        calls[name] = partial(by, AttentionPlan(heads), tile=tile)
    inputs = measure.ring(
        x, 2 if setting.seconds == 0 else measure.ring_length(x.numel() * x.element_size())
    )
    exact = by(by_library, x.double(), heads=heads)
    off = {name: relative_error(call(x), exact) for name, call in calls.items()}
    modes = {"us": True, "eager_us": False}
    times = {
        mode: {
            name: measure.milliseconds(call, inputs, setting.seconds / 3, captured=captured)[1]
            * 1e3
            for name, call in calls.items()
            if captured or name not in names[1:]
        }
        for mode, captured in modes.items()
    }
    right = all(off[name] <= 2 * off[library] for name in names)
    return {"ok": right, "off": off, "tokens": len(x), **times}
