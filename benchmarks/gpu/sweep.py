"""Triton tiles beside those of the tuning space: linear and qkv, and the feed-forward at rank 256.

Compiled for Hopper by Triton 3.6 none uses more than 8 bytes of local memory. A line holds the microseconds of every
tile at one size, in graph replays, the fastest first; a tile whose results differ from two matmuls is left out and
named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, astuple, fields, replace

import torch

from lowrank_kernels import env, measure, rivals
from lowrank_kernels.backends import FALLBACK, bind
from lowrank_kernels.problem import Problem
from lowrank_kernels.triton_backend import device as triton_device
from lowrank_kernels.triton_backend import launch
from lowrank_kernels.triton_backend.tiles import SPLITS, Tile, space, with_split

from .results import Setting

WIDTH, NEURONS = 768, 3072
# Operator, inner, outer, neurons, rank; then the rows, those that decide most first.
SIZES = (
    (("ffn", WIDTH, WIDTH, NEURONS, 256), (512, 128, 4096)),
    (("qkv", WIDTH, WIDTH, 0, 256), (4096, 16384, 512)),
    (("linear", WIDTH, NEURONS, 0, 256), (4096, 16384, 512)),
    (("linear", NEURONS, WIDTH, 0, 256), (4096, 16384)),
    (("qkv", WIDTH, WIDTH, 0, 128), (4096, 16384, 512)),
    (("linear", WIDTH, NEURONS, 0, 128), (4096, 16384)),
)
# Rows, columns, depth, neurons, warps, stages.
TILES = {
    ("ffn", 256): (
        *((16, 128, 128, 64, 8, 3), (16, 128, 128, 64, 4, 3), (64, 64, 32, 32, 8, 3)),
        *((64, 128, 64, 64, 8, 2), (128, 64, 64, 32, 8, 3), (128, 64, 32, 32, 8, 3)),
        (128, 128, 64, 32, 8, 2),
    ),
    ("linear", 256): (
        *((128, 128, 64, 0, 8, 3), (128, 128, 32, 0, 8, 3), (128, 64, 64, 0, 8, 3)),
        *((64, 128, 64, 0, 4, 3), (64, 64, 64, 0, 4, 4), (64, 64, 64, 0, 8, 4)),
    ),
    ("linear", 128): (
        *((128, 128, 64, 0, 8, 3), (128, 128, 64, 0, 8, 4), (128, 128, 32, 0, 8, 4)),
        *((64, 128, 64, 0, 4, 4), (64, 256, 64, 0, 8, 3), (128, 64, 64, 0, 8, 4)),
    ),
}


def _tiles(operator: str, rank: int, rows: int) -> list[Tile]:
    """The tuning space and what is tried beside it; short tiles for few rows only."""
    listed = TILES["ffn" if operator == "ffn" else "linear", rank]
    tiles = [*space(operator, rank, 2), *(Tile(*one) for one in listed)]
    return [tile for tile in dict.fromkeys(tiles) if tile.block_m >= 64 or rows <= 1024]


def _problems() -> Iterator[Problem]:
    for (operator, inner, outer, neurons, rank), rows in SIZES:
        for count in rows:
            yield Problem(operator, count, inner, outer, rank, torch.bfloat16, neurons)


def candidates(device: torch.device) -> Iterator[tuple[Problem, dict]]:
    """Every size with every tile; the splits of a tile cost no compilation."""
    for problem in _problems():
        for tile in _tiles(problem.operator, problem.rank, problem.rows):
            for splits in (1, 2) if problem.operator == "ffn" else (1,):
                yield problem, {"tile": asdict(replace(tile, splits=splits))}


def _splits(problem: Problem, tile: Tile, processors: int) -> set[int]:
    """What counting waves chose, and its neighbours."""
    width = problem.hidden or problem.outer
    chosen = with_split(
        tile, problem.operator, problem.rows, problem.inner, width, processors
    ).splits
    at = SPLITS.index(chosen)
    return set(SPLITS[max(at - 1, 0) : at + 2])


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure the sizes that are not known yet, until it is late."""
    device = env.device_of_choice()
    processors = triton_device.facts(device).processors
    known = setting.results.known()
    names = [field.name for field in fields(Tile)]
    for problem in _problems():
        shape = f"{problem.inner}x{problem.hidden or ''}x{problem.outer}"
        key = f"sweep/{problem.operator}/{shape}/r{problem.rank}/m{problem.rows}"
        if key in known:
            continue
        if setting.late(3):
            return
        x, factors, rest = rivals.arguments(problem, device)
        inputs = measure.ring(x, measure.ring_length(x.numel() * x.element_size()))
        library = bind(FALLBACK, problem.operator, factors)
        right = library(x, *rest)
        found: list[tuple[float, list[int]]] = []
        left_out: dict[str, str] = {}
        library_ms = measure.milliseconds(library, inputs, setting.seconds)[1]
        calls = {
            one: rivals.prepared("triton", problem, factors, rest, {"tile": asdict(one)})
            for tile in _tiles(problem.operator, problem.rank, problem.rows)
            for splits in sorted(_splits(problem, tile, processors))
            for one in [replace(tile, splits=splits)]
        }
        if device.type == "cuda":
            # What was not brought compiled, several at a time.
            with launch.compile_ahead():
                for call in calls.values():
                    call(x)
        for one, call in calls.items():
            try:
                off = rivals.largest_difference(call(x), right)
                if not off <= rivals.TOLERANCE[problem.dtype]:
                    raise ValueError(f"differs by {off:.3g}")
                time = measure.milliseconds(call, inputs, setting.seconds / 4)[1]
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                left_out[str(astuple(one))] = f"{type(error).__name__}: {error}"[:100]
                continue
            found.append((round(time * 1e3, 2), list(astuple(one))))
        setting.results.add(
            key, library_us=library_ms * 1e3, fields=names, us=sorted(found), left_out=left_out
        )
