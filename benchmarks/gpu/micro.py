"""The operators one by one: graph replays, eager calls and the host's part, against library matmuls and dense weights.

All candidates have their factors prepared, as in the fused runtime, with the rank padded to a multiple of 16; inputs go
around a ring larger than the cache. ``dense`` has the merged weights, query, key and value as one matrix.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks import operators as benchmark
from lowrank_kernels import env, measure, rivals
from lowrank_kernels.backends import backend_names, bind, why_not
from lowrank_kernels.problem import Problem
from lowrank_kernels.triton_backend import device as triton_device
from lowrank_kernels.triton_backend.tiles import default

from .results import Setting

# Above this the queue of launches is never empty, and the host's time cannot be told.
HOST_ROWS = 512
HOST_CALLS = 40


def problems(setting: Setting) -> list[tuple[str, int, int, int]]:
    """Operators with their widths: in, out, neurons."""
    width, neurons = setting.width, setting.neurons
    return [
        ("ffn", width, width, neurons),
        ("qkv", width, width, 0),
        ("linear_norm", width, width, 0),
        ("linear", width, width, 0),
        ("linear", width, neurons, 0),
        ("linear", neurons, width, 0),
    ]


def default_tiles(setting: Setting, device: torch.device) -> Iterator[tuple[Problem, dict]]:
    """What ``run`` asks of Triton, where no tile is named, by problem."""
    sizes = itertools.product(setting.ranks, setting.rows, problems(setting))
    facts = triton_device.facts(device)
    for rank, rows, (operator, inner, outer, neurons) in sizes:
        problem = Problem(
            operator, rows, inner, outer, rank, getattr(torch, setting.dtype), neurons
        )
        given = (rank, problem.dtype.itemsize, rows, inner, neurons or outer, facts.processors)
        tile = default(operator, *given, triton_device.family(device))
        for splits in {1, 2, tile.splits} if operator == "ffn" else {1}:
            yield problem, {"tile": asdict(replace(tile, splits=splits))}


def _calls(problem: Problem, device: torch.device) -> tuple[dict[str, Callable], torch.Tensor]:
    """Every candidate as a function of x, and an x."""
    x, factors, rest = rivals.arguments(problem, device)
    calls: dict[str, Callable] = {}

    def add(name: str, backend: str, **keywords: Any) -> None:
        function = bind(backend, problem.operator, factors)
        calls[name] = lambda x: function(x, *rest, **keywords)

    for name in backend_names():
        if why_not(name, problem, device, prepared=True) is None:
            add(name, name)
    if "triton" in calls and problem.operator != "linear_norm":
        # What counting waves chose, against other splits of the same tile.
        width = problem.hidden or problem.outer
        facts = triton_device.facts(device)
        sizes = (problem.rank, problem.dtype.itemsize, problem.rows, problem.inner, width)
        tile = default(problem.operator, *sizes, facts.processors, triton_device.family(device))
        for splits in {1, 2, 4} - {tile.splits}:
            add(f"triton, {splits} splits", "triton", tile=replace(tile, splits=splits))
    return calls, x


def _host_microseconds(call: Callable, x: torch.Tensor) -> float:
    best, repeats = float("inf"), HOST_CALLS if x.is_cuda else 1
    for _ in range(5 if x.is_cuda else 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call(x)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best * 1e6


def _measured(call: Callable, x: torch.Tensor, right: tuple, seconds: float) -> dict[str, Any]:
    inputs = measure.ring(x, measure.ring_length(x.numel() * x.element_size()) if x.is_cuda else 2)
    row: dict[str, Any] = {"off": rivals.largest_difference(call(x), right)}
    low, row["ms"], high = measure.milliseconds(call, inputs, seconds)
    row["spread"] = high - low
    row["eager_ms"] = measure.milliseconds(call, inputs, seconds, captured=False)[1]
    if len(x) <= HOST_ROWS:
        row["host_us"] = _host_microseconds(call, x)
    return row


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure what is not known yet, until it is late."""
    torch.set_num_threads(1)
    device, dtype = env.device_of_choice(), getattr(torch, setting.dtype)
    if "micro/ceilings" not in setting.results.known() and device.type == "cuda":
        setting.results.add("micro/ceilings", **benchmark.ceilings(device, dtype))
    known = setting.results.known()
    for rank, rows, sizes in itertools.product(setting.ranks, setting.rows, problems(setting)):
        operator, inner, outer, neurons = sizes
        key = f"micro/{operator}/{inner}x{neurons or ''}x{outer}/r{rank}/m{rows}"
        if key in known:
            continue
        if setting.late():
            return
        problem = Problem(operator, rows, inner, outer, rank, dtype, neurons)
        calls, x = _calls(problem, device)
        right, found = calls["torch"](x), {}
        for name, call in calls.items():
            try:
                found[name] = _measured(call, x, right, setting.seconds)
            except Exception as error:
                if "CUDA error" in str(error):
                    setting.results.add(key, failed=name, error=str(error)[:300])
                    raise
                found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        point = benchmark.Point(operator, rows, inner, outer, neurons, rank, setting.dtype)
        setting.results.add(key, flops=point.flops(), bytes=point.bytes(), rivals=found)
