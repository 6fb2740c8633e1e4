"""``csrc/predict.h`` against what was measured on an H100, and the choice that follows from it, built with g++."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

import cuda_simulator
import numpy as np
import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu" / "h100.jsonl"
PROCESSORS = 132
# Clusters of a size that the measured GPU holds at a time.
FIT = {1: 132, 2: 66, 4: 31, 8: 14}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Measured(NamedTuple):
    """A time in microseconds, of a problem (rows, inner, outer, rank, neurons) by a tile and a cluster."""

    problem: tuple[int, int, int, int, int]
    choice: tuple[int, int, int, int]
    time: float


@cache
def _measured(trace: str) -> tuple[Measured, ...]:
    return tuple(_points(trace))


def _points(trace: str) -> Iterator[Measured]:
    for line in RESULTS.read_text().splitlines():
        one = json.loads(line)
        if not one["key"].startswith("clusters/"):
            continue
        shape, rank_text, rows_text = one["key"].split("/")[2:]
        rank, rows = int(rank_text[1:]), int(rows_text[1:])
        inner, neurons, outer = (int(width or 0) for width in shape.split("x"))
        problem = (rows, inner, outer, rank, neurons)
        for name, time in one["us"].items():
            # As benchmarks.gpu.clusters names a candidate.
            found = re.fullmatch(r"(?:(\d+) )?c(\d)( w)?", name)
            if found is None:
                continue
            tile, cluster, weights = int(found[1] or 128), int(found[2]), int(found[3] is not None)
            if neurons:
                part = (128 if rank <= 128 else 256) // cluster
            else:
                (_, part, *_), *_ = _choice(trace, problem, tile, cluster, weights)
            yield Measured(problem, (tile, int(part), cluster, weights), time)


@cache
def _choice(trace: str, problem: tuple[int, ...], *wish: int) -> list[list[str]]:
    rows, cluster, weights = wish or (0, 0, 0)
    given = (*problem[:4], PROCESSORS, rows, cluster, weights, problem[4])
    return cuda_simulator.run_trace(trace, "choice", *given)


@cache
def _predicted(trace: str, one: Measured) -> float:
    rows, _, cluster, weights = one.choice
    groups = ceil(ceil(one.problem[0] / rows) / (cluster if weights else 1))
    ctas = min(groups, FIT[cluster]) * cluster
    (words,) = cuda_simulator.run_trace(trace, "predict", *one.problem, *one.choice, ctas)
    launch, a_round = map(float, words)
    return launch + ceil(groups / FIT[cluster]) * a_round


@pytest.mark.results
def test_predictions_are_near_what_was_measured(trace):
    """The errors that predict.h states."""
    measured = list(_measured(trace))
    errors = np.array([_predicted(trace, one) / one.time - 1 for one in measured])
    assert len(errors) == 420
    assert np.median(abs(errors)) < 0.065, np.median(abs(errors))
    assert abs(errors).max() < 0.33, measured[abs(errors).argmax()]


@pytest.mark.results
def test_what_was_fastest_is_predicted_to_be_near_it(trace):
    """Of the tiles and clusters of a problem, the one predicted to be the fastest lost 15 % at most; 10 in a
    feed-forward."""
    by_problem: dict[tuple, list[Measured]] = {}
    for one in _measured(trace):
        by_problem.setdefault(one.problem, []).append(one)
    assert len(by_problem) == 56
    for problem, tried in by_problem.items():
        chosen = min(tried, key=lambda one: _predicted(trace, one))
        most = 1.1 if problem[4] else 1.15
        assert chosen.time <= most * min(one.time for one in tried), problem


@pytest.mark.parametrize("inner, outer", [(768, 768), (768, 3072), (3072, 768)])
@pytest.mark.parametrize("rank", [128, 256])
def test_a_free_choice_is_what_is_predicted_to_be_the_fastest(trace, inner, outer, rank):
    """No wish is predicted to be faster, and twice the rows never to take less."""
    times = []
    for rows in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        problem = (rows, inner, outer, rank, 0)
        times.append(float(_choice(trace, problem)[-1][1]))
        wishes = [(tile, size, 0) for tile in (64, 128) for size in (1, 2, 4, 8)]
        for wish in [*wishes, (64, 2, 1), (128, 2, 1)]:
            lines = _choice(trace, problem, *wish)
            if lines[0] != ["0"] * 4 and (wish[1] - 1) * 128 < outer:
                assert float(lines[-1][1]) >= times[-1], wish
    assert times == sorted(times)
