"""The CUDA kernels' schedule, cluster and barrier arithmetic, built with g++ and run in adversarial orders."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import cuda_simulator
import pytest
import torch

from lowrank_kernels.cuda_backend import support
from lowrank_kernels.problem import Problem

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {"linear": 227 * 1024, "ffn": 227 * 1024, "ampere": 99 * 1024}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


# rows and rank of the tile; M, K, N, R; CTAs of the cluster, of those that share rows; clusters at a time
LINEAR = [
    (128, 256, 300, 136, 200, 245, 1, 1, 2),
    (128, 128, 129, 72, 392, 250, 2, 2, 1),
    (128, 64, 257, 200, 776, 245, 4, 4, 1),
    (128, 32, 1, 8, 8, 200, 8, 8, 1),
    (128, 32, 400, 264, 1160, 256, 8, 8, 2),
    (128, 256, 700, 136, 264, 250, 2, 1, 1),
    (128, 64, 385, 72, 136, 40, 2, 1, 1),
    (64, 512, 150, 136, 200, 500, 1, 1, 1),
    (64, 256, 130, 264, 520, 500, 2, 2, 1),
    (64, 128, 65, 72, 648, 512, 4, 4, 1),
    (64, 64, 200, 136, 1032, 512, 8, 8, 1),
    (64, 32, 63, 128, 256, 40, 2, 2, 1),
    (64, 512, 300, 72, 264, 300, 2, 1, 1),
]
# rank and CTAs of the tile; M, K, F, N, R1, R2; clusters at a time
FFN = [
    (256, 1, 300, 136, 200, 264, 245, 200, 1),
    (128, 2, 257, 72, 392, 136, 130, 256, 1),
    (64, 4, 129, 136, 1000, 776, 245, 245, 1),
    (32, 8, 400, 200, 640, 1032, 256, 250, 2),
    (128, 1, 150, 72, 72, 136, 13, 128, 1),
    (32, 4, 130, 72, 520, 392, 128, 100, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "unfair", "late"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_in_any_order(trace, case, policy):
    launch = cuda_simulator.parse(cuda_simulator.run_trace(trace, "linear", *case))
    for seed in range(2):
        cuda_simulator.simulate(launch, seed, policy, case[2], case[4])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "unfair", "late"])
@pytest.mark.parametrize("case", FFN, ids=str)
def test_ffn_in_any_order(trace, case, policy):
    launch = cuda_simulator.parse(cuda_simulator.run_trace(trace, "ffn", *case))
    for seed in range(2):
        cuda_simulator.simulate(launch, seed, policy, case[2], case[5])


@pytest.mark.parametrize("damage", ["release", "slice", "double", "parity"])
def test_the_simulator_sees_a_broken_schedule(trace, damage):
    """Each kind of mistake, made in a sound trace, is found."""
    launch = cuda_simulator.parse(cuda_simulator.run_trace(trace, "linear", *LINEAR[2]))
    role = next(
        events for (_, cta, worker), events in launch.roles.items() if (cta, worker) == (1, 1)
    )
    releases = [
        i
        for i, event in enumerate(role)
        if event[0] == "arrive" and event[1] < cuda_simulator.SLICE
    ]
    if damage == "release":
        del role[releases[3]]
    elif damage == "slice":
        role[:] = [
            event for event in role if not (event[0] == "wait" and event[1] >= cuda_simulator.SLICE)
        ]
    elif damage == "double":
        role.insert(releases[0], role[releases[0]])
    else:
        index = next(i for i, event in enumerate(role) if event[0] == "wait" and event[1] < 8)
        role[index] = ("wait", role[index][1], 1 - role[index][2])
    with pytest.raises(AssertionError):
        for seed in range(30):
            cuda_simulator.simulate(
                launch, seed, "unfair" if seed % 2 else "random", LINEAR[2][2], LINEAR[2][4]
            )


@pytest.mark.parametrize("damage", ["drain", "round", "swap"])
def test_the_simulator_sees_a_broken_loop_over_neurons(trace, damage):
    """An activation too early, a rounding left out, and two products in the wrong order."""
    launch = cuda_simulator.parse(cuda_simulator.run_trace(trace, "ffn", *FFN[2]))
    role = next(
        events for (_, cta, worker), events in launch.roles.items() if (cta, worker) == (1, 1)
    )
    words = [event[0] for event in role]
    second = words.index("multiply_up1", words.index("multiply_up1") + 1)
    if damage == "drain":
        del role[role.index(("drain", 1), second)]
    elif damage == "round":
        del role[words.index("round", second)]
    else:
        other = words.index("multiply_down2")
        role[second], role[other] = role[other], role[second]
    with pytest.raises(AssertionError):
        cuda_simulator.simulate(launch, 0, "random", FFN[2][2], FFN[2][5])


@pytest.mark.parametrize(
    "case",
    [(128, 130, 72, 200, 100, 1), (256, 65, 8, 392, 250, 3), (256, 1, 100, 8, 200, 1)],
    ids=str,
)
def test_ampere_pipeline(trace, case):
    """Every stage is used after its copy was waited for, and copied into only after the meeting behind its last use."""
    rank, rows, inner, outer = case[:4]
    covered, stored, row = [], [], -1
    stages, groups, current, fresh = {}, [], [], set()
    for word, *rest in cuda_simulator.run_trace(trace, "ampere", *case):
        if word == "role":
            stages, groups, current, fresh = {}, [], [], set()
            row = int(rest[1]) * 64
            used = []
        elif word == "load":
            assert rest[0] not in fresh, "a copy into a stage that others may still read"
            stages[rest[0]] = None
            current.append((rest[0], tuple(rest[1:])))
        elif word == "commit":
            groups.append(current)
            current = []
        elif word == "wait":
            while len(groups) > int(rest[0]):
                stages |= dict(groups.pop(0))
        elif word == "meet":
            fresh.clear()
        elif word == "use":
            kind, index = rest[1:]
            assert stages[rest[0]][:2] == (kind, index), "a stage used before its copy has come"
            fresh.add(rest[0])
            used.append((kind, int(index), int(stages[rest[0]][2])))
        elif word == "write":
            assert [index for _, index, _ in used] == list(range(-(-inner // 32)))
            assert {place for _, _, place in used} == {row} and int(rest[0]) == row
            stored += [row] if int(rest[1]) else []
            used = []
        elif word == "store":
            assert [index for _, index, _ in used] == list(range(rank // 64))
            assert {place for _, _, place in used} == {int(rest[1])}
            covered.append((int(rest[0]), int(rest[1])))
            used = []
    assert sorted(covered) == [(r, c) for r in range(0, rows, 64) for c in range(0, outer, 64)]
    assert stored == list(range(0, rows, 64))


def test_accumulator_places(trace):
    """The epilogue's short form of a place equals the swizzle of its row and column, and no two elements share one."""
    found: dict[tuple, dict[tuple, int]] = {}
    for pitch, first, row, column, mine, right in (
        map(int, line) for line in cuda_simulator.run_trace(trace, "index")
    ):
        assert mine == right
        found.setdefault((pitch, first), {})[row, column] = mine
    for (_, first), places in found.items():
        assert len(places) == len(set(places.values())) == 64 * 64
        assert set(places) == {(r, c) for r in range(64) for c in range(first * 8, first * 8 + 64)}


def test_shared_memory_and_instances(trace):
    """Every tile fits, in every cluster it may run in, and each has its file."""
    tiles = [(kind, *map(int, rest)) for kind, *rest in cuda_simulator.run_trace(trace, "tiles")]
    for kind, *_, shared in tiles:
        assert shared <= SHARED_LIMIT[kind]
    wanted = {
        f"linear_{rows}_{rank}_sm90a.cu"
        for kind, *rest in tiles
        if kind == "linear"
        for rows, rank, *_ in [rest]
    }
    wanted |= {
        f"ffn_{rank}_{columns}_sm90a.cu"
        for kind, *rest in tiles
        if kind == "ffn"
        for rank, columns, _ in [rest]
    }
    wanted |= {
        f"linear_{rank}_sm80.cu" for kind, *rest in tiles if kind == "ampere" for rank, _ in [rest]
    }
    assert wanted == {path.name for path in (ROOT / "csrc").glob("*_*_*.cu")}
    for name in wanted:
        numbers = re.search(r"<([\d, ]+)>", (ROOT / "csrc" / name).read_text()).group(1)
        assert re.sub(r"\D+", "_", numbers) == re.search(r"_((?:\d+_)*\d+)_sm", name).group(1)


def test_choice_serves_what_it_says(trace):
    """A free choice always holds the rank; 512 and below is always served, and a wish that cannot be is refused."""
    for rank in (8, 16, 48, 128, 136, 245, 256, 272, 512):
        for rows in (1, 64, 500, 4096, 65536):
            for outer in (8, 768, 3072):
                (tile, part, cluster, weights), (ffn_part, ffn_cluster) = (
                    map(int, line)
                    for line in cuda_simulator.run_trace(
                        trace, "choice", rows, 768, outer, rank, 132
                    )[:2]
                )
                columns = 1 if weights else cluster
                assert part * columns >= rank and tile * part * columns <= 128 * 256
                assert (
                    cuda_simulator.run_trace(trace, "tiles").count(
                        [
                            "linear",
                            str(tile),
                            str(part),
                            str(columns),
                            *_shared(trace, tile, part, columns),
                        ]
                    )
                    == 1
                )
                assert (ffn_part * ffn_cluster >= rank) == (rank <= 256)
    assert cuda_simulator.run_trace(trace, "choice", 64, 768, 768, 520, 132)[0] == ["0"] * 4
    assert cuda_simulator.run_trace(trace, "choice", 64, 768, 768, 256, 132, 128, 3)[0] == ["0"] * 4
    assert cuda_simulator.run_trace(trace, "choice", 64, 768, 768, 256, 132, 64, 8)[0] == [
        "64",
        "32",
        "8",
        "0",
    ]
    assert cuda_simulator.run_trace(trace, "choice", 64, 768, 768, 256, 132, 0, 0, 1)[0] == [
        "128",
        "256",
        "2",
        "1",
    ]


def test_calibration_asks_for_shapes_that_there_are(trace, monkeypatch):
    """Every candidate is one that the launcher serves; the likely ones are among them, and one has no cluster."""
    monkeypatch.setattr(support, "capability", lambda device: 9)
    gpu = torch.device("cuda")
    for operator, rank, rows, outer in itertools.product(
        ("linear", "ffn"), (8, 96, 130, 256, 500), (1, 4096), (8, 776)
    ):
        if operator == "ffn" and rank > support.RANK_LIMIT_FFN:
            continue
        problem = Problem(operator, rows, 136, outer, rank, torch.bfloat16, 264)
        found = [support.parse_options(one) for one in support.candidates(problem, gpu)]
        assert found[0] == {} and {"cluster": 1}.items() <= found[1].items()
        for one in [*found, *support.likely(problem, gpu)]:
            wish = (one.get("rows", 0), one.get("cluster", 0), int(one.get("weights", False)))
            lines = cuda_simulator.run_trace(
                trace, "choice", rows, 136, outer, rank, 132, *wish, 264
            )
            served = lines[1 if operator == "ffn" else 0]
            assert "0" not in served[:2], (problem, one)
        likely = list(support.likely(problem, gpu))
        assert ({"cluster": 1} in likely) == (rows >= support.FEW_ROWS) and len(likely) <= 3
    monkeypatch.setattr(support, "capability", lambda device: 8)
    assert list(support.candidates(problem, gpu)) == list(support.likely(problem, gpu)) == [{}]


def _shared(trace, *tile):
    return [
        line[-1]
        for line in cuda_simulator.run_trace(trace, "tiles")
        if line[:-1] == ["linear", *map(str, tile)]
    ]
