"""Correctness: every operator against float64, forward, backward, by every tile, and replayed from a CUDA graph.

The bound is that of the tests: at most twice the error of library matmuls. Cases run over many processes, because
nearly all of the time is Triton's compiler; one that ends in a CUDA error costs its process, and the others go on.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lowrank_kernels.backends import get_backend, operators
from lowrank_kernels.triton_backend import device as triton_device
from lowrank_kernels.triton_backend.tiles import space
from tests.lowrank_kernels.kernel_cases import (
    DEVICE,
    Sizes,
    arguments,
    assert_no_worse,
    call,
    exact,
    gradients,
)

from .results import Setting, relative_error

OPERATORS = ("ffn", "linear", "qkv", "linear_norm")
# The CUDA C++ backend has these.
CUDA_OPERATORS = ("linear", "ffn")
# Processes that may be lost to a broken GPU before the rest is given up.
MOST_POOLS = 5


class Case(NamedTuple):
    """One check: its kind, and the sizes. ``odd`` is a width that is a multiple of 8 and not of 16 (TinyBERT's 312)."""

    kind: str
    operator: str
    dtype: str
    rank: int
    rows: int
    width: int
    neurons: int

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


def cases(setting: Setting, backend: str) -> Iterator[Case]:
    """The cases, what matters most first."""
    toy = setting.processes == 0
    names = OPERATORS if backend == "triton" else CUDA_OPERATORS
    half = "float32" if toy else "bfloat16"
    size = (setting.width, setting.neurons)
    few = 5 if toy else 257
    first = setting.ranks[0]
    for name in names:
        yield Case("forward", name, half, first, few, *size)
    for kind in ("graph", "backward", *(("tiles",) if backend == "triton" else ())):
        for name in names:
            yield Case(kind, name, half, first, few, *size)
    if toy:
        yield Case("odd", "linear", "float16", 13, 5, 24, 40)
        return
    for rank, rows, name in itertools.product((245, 128, 64, 384, 192, 96), (257, 4096, 1), names):
        for dtype in ("bfloat16", "float16"):
            yield Case("forward", name, dtype, rank, rows, *size)
    for name in names:
        if backend == "triton":
            yield Case("forward", name, "float32", 128, 257, *size)
            for rank in (128, 384):
                yield Case("tiles", name, "bfloat16", rank, 300, *size)
        yield Case("backward", name, "float16", 128, 257, *size)
        yield Case("odd", name, "bfloat16", 77, 129, 312, 1248)


def _relative(results: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return max(relative_error(mine, right) for mine, right in zip(results, truth, strict=True))


def check(case: Case, backend: str) -> dict[str, Any]:
    """Run a case; its error against float64 and that of library matmuls.

    Raises:
        AssertionError: the bound is broken, a second call differs, or a replayed graph does.
    """
    torch.manual_seed(0)
    sizes = Sizes(case.rows, case.width, case.width, case.rank, case.neurons)
    tensors = arguments(case.operator, sizes, getattr(torch, case.dtype))
    if case.kind == "backward":
        wanted = [index for index, tensor in enumerate(tensors) if tensor is not None]
        mine, other, truth = (
            gradients(case.operator, given, name, wanted)
            for given, name in ((tensors, backend), (tensors, "torch"), (exact(tensors), "torch"))
        )
        assert_no_worse(mine, other, truth)
        return {"error": _relative(mine, truth), "unfused": _relative(other, truth)}
    other = call(case.operator, tensors, "torch")
    truth = call(case.operator, exact(tensors), "torch")
    found = {"unfused": _relative(other, truth)}
    if case.kind == "tiles":
        errors = []
        for mine in _by_every_tile(case, tensors):
            assert_no_worse(mine, other, truth)
            errors.append(_relative(mine, truth))
        return {"error": max(errors), "tiles": len(errors), **found}
    mine = call(case.operator, tensors, backend)
    assert_no_worse(mine, other, truth)
    again = call(case.operator, tensors, backend)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "a second call differs"
    if case.kind == "graph" and DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = call(case.operator, tensors, backend)
        for y in captured:
            y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        same = [torch.equal(a, b) for a, b in zip(captured, mine, strict=True)]
        assert all(same), "the replayed graph differs"
    return {"error": _relative(mine, truth), **found}


def _by_every_tile(case: Case, tensors: list) -> Iterator[list[torch.Tensor]]:
    function, dtype = operators("triton")[case.operator], getattr(torch, case.dtype)
    # A query, key and value have ranks of their own.
    rank = max(len(down) for down in tensors[1:4]) if case.operator == "qkv" else case.rank
    tiles = space(case.operator, rank, dtype.itemsize, triton_device.family(DEVICE))
    for tile, splits in itertools.product(
        tiles, (1,) if case.operator == "linear_norm" else (1, 4)
    ):
        chosen = replace(tile, splits=splits)
        x, rest = tensors[0], tensors[1:]
        if case.operator == "qkv":
            yield list(function(x, rest[:3], rest[3:6], rest[6:], tile=chosen)[0])
        elif case.operator == "linear_norm":
            yield [function(*tensors, 1e-5, tile=chosen)[0]]
        else:
            activation = "none" if case.operator == "linear" else "gelu"
            yield [function(*tensors, activation, tile=chosen)[0]]


# Whether a CUDA error has left this process without a GPU.
_lost = False


def checked(case: Case, backend: str) -> dict[str, Any]:
    """``check`` as a result: ``ok``, and either the errors or what went wrong."""
    global _lost
    if _lost:
        os._exit(3)
    begin = time.time()
    try:
        return {"ok": True, **check(case, backend), "seconds": time.time() - begin}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        _lost = "CUDA error" in text or "Accelerator" in text
        # Into the log, and not the results: it is full of one machine's paths.
        traceback.print_exc()
        return {"ok": False, "error": text[:400]}


def run(setting: Setting, backend: str = "triton") -> None:
    """Check what is not known yet, until it is late."""
    reason = get_backend(backend).why_not_on(DEVICE)
    if reason is not None:
        setting.results.add(f"correct/{backend}", ok=False, error=reason)
        return
    for _ in range(MOST_POOLS):
        known = setting.results.known()
        by_key = {f"correct/{backend}/{case.key}": case for case in cases(setting, backend)}
        todo = {key: case for key, case in by_key.items() if key not in known}
        if not todo or setting.late():
            return
        if setting.processes == 0:
            for key, case in todo.items():
                setting.results.add(key, **checked(case, backend))
            return
        _in_processes(setting, backend, todo)


def _in_processes(setting: Setting, backend: str, todo: dict[str, Case]) -> None:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(setting.processes, len(todo)), mp_context=context)
    work = {pool.submit(checked, case, backend): key for key, case in todo.items()}
    try:
        for done in as_completed(work, timeout=max(1.0, setting.deadline - time.time())):
            setting.results.add(work[done], **done.result())
    except BrokenProcessPool:
        # The others are tried again, in new processes.
        pass
    except TimeoutError:
        running = [key for future, key in work.items() if future.running()]
        setting.results.add(
            f"unfinished/{backend}", ok=False, error=f"running at the end: {running}"
        )
        for process in list(pool._processes.values()):
            process.kill()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
