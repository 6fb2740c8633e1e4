"""Time one call: CUDA-graph replays or eager calls on a GPU, plain calls on a CPU; inputs rotated out of the cache.

A single timing of a 5-microsecond kernel measures the launch; a replayed graph of several calls measures the
kernel. And a call on the inputs of the call before finds them in the L2 cache, which no layer of a model does: so the
calls of a graph go around a ring of inputs that together are larger than the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RING_BYTES = 256 * 2**20
QUANTILES = (0.2, 0.5, 0.8)


def ring_length(bytes_per_call: int, limit: int = 64) -> int:
    """How many input sets together exceed the cache: at least 2, at most ``limit``."""
    return max(2, min(limit, RING_BYTES // max(bytes_per_call, 1) + 1))


def ring(x: Tensor, count: int) -> list[Tensor]:
    """``count`` copies of ``x`` at different addresses."""
    return [x] + [x.clone() for _ in range(count - 1)]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles of some samples."""
    ordered = sorted(samples)
    low, middle, high = (ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in QUANTILES)
    return low, middle, high


def _graph(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call on each input, after a warm-up on a side stream that compiles what is to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in inputs[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    return graph


def _in_turn(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Eager calls on all inputs, after a first one that compiles what is to be compiled."""
    call(inputs[0])

    def replay() -> None:
        for x in inputs:
            call(x)

    return replay


def milliseconds(
    call: Callable[[Tensor], object],
    inputs: Sequence[Tensor],
    budget: float = 0.1,
    limit: int = 50,
    captured: bool = True,
) -> tuple[float, float, float]:
    """Milliseconds of ``call(x)``, going around ``inputs``: quantiles 0.2, 0.5, 0.8 over repetitions.

    Args:
        call: takes one input.
        inputs: tensors of one shape; see ``ring``.
        budget: seconds to spend, about.
        limit: repetitions at most (at least 5 are made).
        captured: on a GPU, time replays of a CUDA graph, which is the device's time; else eager calls in a row, which
            take the host's time where that is longer.
    """
    if inputs[0].is_cuda:
        replay = _graph(call, inputs).replay if captured else _in_turn(call, inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            start.record()
            replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / len(inputs)
    else:
        call(inputs[0])

        def once() -> float:
            begin = time.perf_counter()
            for x in inputs:
                call(x)
            return (time.perf_counter() - begin) * 1e3 / len(inputs)

    first = once()
    repetitions = max(5, min(limit, int(budget * 1e3 / max(first * len(inputs), 1e-6))))
    return quantiles([once() for _ in range(repetitions)])
