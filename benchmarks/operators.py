"""Time every operator against what it replaces: dense, two library matmuls, both compiled, and each fused backend.

    python -m benchmarks.operators            # on a GPU: the suite in under 8 minutes; on a CPU: a short version
    python -m benchmarks.operators --minutes 2 --operators ffn

All columns of a point run in one process on the same values, the inputs going around a ring larger than the cache; on a
GPU as CUDA-graph replays, on a CPU as plain calls on one thread. The ceilings behind "percent of the floor" (a large
matmul, a large copy) are measured in the same run. One record a device goes to ``benchmarks/results/operators.jsonl``.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_kernels as lk
from bert_decomp.io.environment import commit
from lowrank_kernels import backends, env, measure

from .operator_points import OPERATORS, Point, points
from .records import save_record, suite_file


def weights(point: Point, device: torch.device) -> dict[str, tuple]:
    """Random factors and dense weights of a point: what "low" and "dense" columns take after x."""
    dtype = getattr(torch, point.dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    k, n, f, r, m = point.inner, point.outer, point.hidden, point.rank, point.rows

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device, generator=generator) / shape[-1] ** 0.5
        return values.to(dtype).requires_grad_(point.backward)

    if point.operator == "qkv":
        low = tuple(tuple(normal(*shape) for _ in range(3)) for shape in ((r, k), (n, r), (n,)))
        return {"low": low, "dense": (normal(3 * n, k), normal(3 * n))}
    if point.operator == "ffn":
        low = (normal(r, k), normal(f, r), normal(f), normal(r, f), normal(n, r), normal(n))
        return {"low": low, "dense": (normal(f, k), normal(f), normal(n, f), normal(n))}
    low = (normal(r, k), normal(n, r), normal(n))
    norm = (normal(m, n), normal(n), normal(n)) if point.operator == "linear_norm" else ()
    return {"low": (*low, *norm), "dense": (normal(n, k), normal(n), *norm)}


def _dense_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _dense_norm(
    x: Tensor, w: Tensor, b: Tensor, residual: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    return F.layer_norm(F.linear(x, w, b) + residual, scale.shape, scale, shift, 1e-12)


FUSED = {
    "linear": lk.lowrank_linear,
    "qkv": lk.lowrank_qkv,
    "ffn": lk.lowrank_ffn,
    "linear_norm": lk.lowrank_linear_norm,
}
# The strongest dense form: query, key and value as one matrix.
DENSE = {"linear": F.linear, "qkv": F.linear, "ffn": _dense_ffn, "linear_norm": _dense_norm}


def columns(
    point: Point, device: torch.device, compiled: bool
) -> dict[str, Callable[[Tensor], object]]:
    """The rivals of a point by name, each a function of x alone."""
    given = weights(point, device)
    dense, fused = DENSE[point.operator], FUSED[point.operator]
    low = given["low"] if point.backward else _aligned(point.operator, given["low"])
    calls: dict[str, Callable[[Tensor], object]] = {
        "dense": lambda x: dense(x, *given["dense"]),
        "two_matmuls": lambda x: fused(x, *low, backend="torch"),
    }
    if compiled:
        calls["dense_compiled"] = torch.compile(calls["dense"], dynamic=False)
        calls["two_matmuls_compiled"] = torch.compile(calls["two_matmuls"], dynamic=False)
    for name in backends.backend_names():
        backend = backends.get_backend(name)
        if name != "torch" and not backend.prepared_only and backend.why_not_on(device) is None:
            calls[name] = lambda x, name=name: fused(x, *low, backend=name)
    if device.type == "cuda":
        calls["auto"] = lambda x: fused(x, *low)
    if point.backward:
        leaves = {True: _leaves(given["low"]), False: _leaves(given["dense"])}
        return {
            name: _with_backward(call, leaves["dense" not in name]) for name, call in calls.items()
        }
    return calls


def _aligned(operator: str, low: tuple) -> tuple:
    """The factors with their rank padded to a multiple of 16: odd rows are slow for library matmuls, too."""
    if operator == "qkv":
        pairs = [lk.align_factors(*pair) for pair in zip(*low[:2], strict=True)]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs), low[2]
    if operator == "ffn":
        return (*lk.align_factors(*low[:2]), low[2], *lk.align_factors(*low[3:5]), low[5])
    return (*lk.align_factors(*low[:2]), *low[2:])


def _leaves(values: tuple) -> list[Tensor]:
    return [
        leaf
        for value in values
        for leaf in (_leaves(value) if isinstance(value, tuple) else [value])
    ]


def _with_backward(
    call: Callable[[Tensor], object], leaves: list[Tensor]
) -> Callable[[Tensor], object]:
    """The call followed by the gradients of x and all weights for a gradient of ones."""

    def both(x: Tensor) -> object:
        outputs = call(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, [x, *leaves], [torch.ones_like(y) for y in outputs])

    return both


def peak_bytes(call: Callable[[Tensor], object], x: Tensor) -> int | None:
    """Memory that one call takes on top of what is there; None on a CPU."""
    if not x.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_point(point: Point, device: torch.device, compiled: bool, budget: float) -> dict:
    """Measure all columns of a point; a column that cannot run has its error in the place of its times."""
    dtype = getattr(torch, point.dtype)
    x = torch.randn(point.rows, point.inner, device=device).to(dtype)
    count = measure.ring_length(x.numel() * x.element_size()) if device.type == "cuda" else 4
    inputs = [value.requires_grad_(point.backward) for value in measure.ring(x, count)]
    found: dict[str, dict] = {}
    with torch.set_grad_enabled(point.backward):
        for name, call in columns(point, device, compiled).items():
            try:
                memory = peak_bytes(call, inputs[0])
                low, median, high = measure.milliseconds(call, inputs, budget)
            except Exception as error:  # One rival that fails must not hide the others' times.
                found[name] = {"error": str(error).splitlines()[0][:200]}
                continue
            found[name] = {"ms": median, "ms_q20": low, "ms_q80": high, "peak_bytes": memory}
    return {**asdict(point), "flops": point.flops(), "bytes": point.bytes(), "columns": found}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches here: FLOP/s of a large matmul, bytes/s of a large copy."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    matmul = measure.milliseconds(lambda x: x @ a, [a, a.clone()], 0.5)[0]
    big = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device, dtype=torch.float32)
    target = torch.empty_like(big)
    copy = measure.milliseconds(lambda x: target.copy_(x), [big], 0.5)[0]
    return {"flops_per_s": 2e3 * size**3 / matmul, "bytes_per_s": 2e3 * big.numel() * 4 / copy}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="stop after this long; what is left out is counted",
    )
    parser.add_argument(
        "--budget", type=float, default=0.03, help="seconds of timing for each column of a point"
    )
    parser.add_argument("--rows", nargs="+", type=int, help="these numbers of rows only")
    parser.add_argument("--output", type=Path, default=suite_file("operators"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = env.device_of_choice()
    gpu = device.type == "cuda"
    chosen = [
        p for p in points(gpu, options.operators) if options.rows is None or p.rows in options.rows
    ]
    if not chosen:
        parser.error("no point of the suite has these numbers of rows")
    begin = time.monotonic()
    described = env.describe()
    content = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": described["gpu"] if gpu else described["cpu"],
        "environment": described,
        "threads": 1,
        "ceilings": ceilings(device, torch.bfloat16 if gpu else torch.float32),
        "points": [],
        "left_out": 0,
    }
    for index, point in enumerate(chosen):
        if time.monotonic() - begin > 60 * options.minutes:
            content["left_out"] = len(chosen) - index
            break
        # Compiling takes seconds, and a few points are enough to see what it gives.
        compiled = (
            gpu
            and point.rank in (128, 256)
            and point.rows in (4096, 16384)
            and point.inner in (768, 3072)
        )
        content["points"].append(run_point(point, device, compiled, options.budget))
        print(
            f"\r{index + 1}/{len(chosen)} {point.operator} {point.inner}x{point.outer} M{point.rows} R{point.rank}  ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    slug = re.sub(r"[^a-z0-9]+", "_", content["device"].lower()).strip("_")
    save_record(options.output, slug, content)
    print(
        f"\nwrote {options.output} in {time.monotonic() - begin:.0f} s, {content['left_out']} points left out",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
