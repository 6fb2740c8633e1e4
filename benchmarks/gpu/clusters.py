"""The CUDA C++ kernels by every tile and cluster, against library matmuls: what ``csrc/predict.h`` is fitted to."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lowrank_kernels import env, measure, rivals
from lowrank_kernels.backends import FALLBACK, get_backend
from lowrank_kernels.problem import Problem

from .results import Setting

RANKS = (256, 128)
ROWS = (4096, 16384, 512, 2048, 8192, 128, 1024)
WIDTH, NEURONS = 768, 3072
SIZES = (
    ("ffn", WIDTH, WIDTH, NEURONS),
    ("linear", WIDTH, NEURONS, 0),
    ("linear", NEURONS, WIDTH, 0),
    ("linear", WIDTH, WIDTH, 0),
)


def name(options: dict[str, Any]) -> str:
    """A candidate in a result: "free", or rows, cluster and whether it shares the weights, as "128 c2 w"."""
    parts = [str(options["rows"])] if "rows" in options else []
    parts += [f"c{options['cluster']}"] if "cluster" in options else []
    return " ".join([*parts, *(["w"] if options.get("weights") else [])]) or "free"


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure the sizes that are not known yet, until it is late."""
    device, backend = env.device_of_choice(), get_backend("cuda")
    reason = backend.why_not_on(device)
    if reason is not None:
        setting.results.add("clusters", ok=False, error=reason)
        return
    known = setting.results.known()
    for rank, rows, (operator, inner, outer, neurons) in itertools.product(RANKS, ROWS, SIZES):
        key = f"clusters/{operator}/{inner}x{neurons or ''}x{outer}/r{rank}/m{rows}"
        if key in known:
            continue
        if setting.late(3):
            return
        problem = Problem(operator, rows, inner, outer, rank, torch.bfloat16, neurons)
        x, factors, rest = rivals.arguments(problem, device)
        inputs = measure.ring(x, measure.ring_length(x.numel() * x.element_size()))
        found: dict[str, float] = {}
        calls = {"torch": (FALLBACK, {}), "dense": ("dense", {})}
        calls |= {name(one): ("cuda", one) for one in backend.candidates(problem, device)}
        for label, (which, options) in calls.items():
            call = rivals.prepared(which, problem, factors, rest, options)
            found[label] = measure.milliseconds(call, inputs, setting.seconds / 3)[1] * 1e3
        setting.results.add(key, us=found)
