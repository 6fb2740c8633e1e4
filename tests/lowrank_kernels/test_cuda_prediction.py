"""``csrc/predict.h`` against what was measured on an H100, and the choice that follows from it, built with g++."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

import cuda_simulator
import numpy as np
import pytest

from tests.csrc.emulator import toolchain

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu" / "h100.jsonl"
PROCESSORS = 132
# Clusters that the measured build launched, and that fit that GPU: one too many of a size doubled the rounds.
LAUNCHED = {1: 132, 2: 66, 4: 32, 8: 16}
FIT = {1: 132, 2: 66, 4: 31, 8: 14}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Measured(NamedTuple):
    """A time in microseconds, of a problem (rows, inner, outer, rank, neurons) by a tile and a cluster."""

    problem: tuple[int, int, int, int, int]
    choice: tuple[int, int, int, int]
    time: float


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return str(toolchain.trace(tmp_path_factory.mktemp("trace")))


def _chosen(rows: int, outer: int, rank: int) -> tuple[int, int, int]:
    """Rows of a tile, cluster and whether it shares weights: what the measured build chose for a linear layer."""
    if rows <= 512:
        return 64, 4 if outer == 768 else 8, 0
    if rows == 4096:
        return (64, 2, 1) if rank == 64 and outer == 768 else (128, 4, 0)
    return 128, 2, 1


def _measured(trace: str) -> Iterator[Measured]:
    for line in RESULTS.read_text().splitlines():
        one = json.loads(line)
        if not one["key"].startswith("cuda/"):
            continue
        _, operator, shape, rank_text, rows_text = one["key"].split("/")
        rank, rows = int(rank_text[1:]), int(rows_text[1:])
        inner, neurons, outer = (int(width or 0) for width in shape.split("x"))
        times = {name: value["ms"] * 1e3 for name, value in one["rivals"].items()}
        if operator == "linear":
            tile = _chosen(rows, outer, rank)
            (_, part, *_), *_ = _choice(trace, (rows, inner, outer, rank, 0), *tile)
            found = (tile[0], int(part), *tile[1:])
            yield Measured((rows, inner, outer, rank, 0), found, times["cuda"])
        for name, time in times.items():
            if name.startswith("cuda c"):
                cluster = int(name.removeprefix("cuda c"))
                found = (128, (128 if rank <= 128 else 256) // cluster, cluster, 0)
                yield Measured((rows, inner, outer, rank, neurons), found, time)


def _choice(trace: str, problem: tuple[int, ...], *wish: int) -> list[list[str]]:
    rows, cluster, weights = wish or (0, 0, 0)
    given = (*problem[:4], PROCESSORS, rows, cluster, weights, problem[4])
    return cuda_simulator.run_trace(trace, "choice", *given)


def _predicted(trace: str, one: Measured) -> float:
    rows, _, cluster, weights = one.choice
    groups = ceil(ceil(one.problem[0] / rows) / (cluster if weights else 1))
    launched = min(groups, LAUNCHED[cluster])
    ctas = min(launched, FIT[cluster]) * cluster
    (words,) = cuda_simulator.run_trace(trace, "predict", *one.problem, *one.choice, ctas)
    launch, a_round = map(float, words)
    return launch + ceil(launched / FIT[cluster]) * ceil(groups / launched) * a_round


@pytest.mark.results
def test_predictions_are_near_what_was_measured(trace):
    """The errors that predict.h states."""
    measured = list(_measured(trace))
    errors = np.array([_predicted(trace, one) / one.time - 1 for one in measured])
    assert len(errors) == 102
    assert np.median(abs(errors)) < 0.05, np.median(abs(errors))
    assert abs(errors).max() < 0.21, measured[abs(errors).argmax()]


@pytest.mark.results
def test_the_cluster_that_was_fastest_is_predicted_to_be_near_it(trace):
    """Of the clusters that a feed-forward was measured with, the one predicted to be the fastest lost at most 10 %."""
    by_problem: dict[tuple, list[Measured]] = {}
    for one in _measured(trace):
        if one.problem[4]:
            by_problem.setdefault(one.problem, []).append(one)
    assert len(by_problem) == 18
    for problem, tried in by_problem.items():
        chosen = min(tried, key=lambda one: _predicted(trace, one))
        assert chosen.time <= 1.1 * min(one.time for one in tried), problem


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
