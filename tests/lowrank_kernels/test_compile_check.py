"""Part of the tuning space through the real compilers, for GPUs that are not here.

The command ``python -m lowrank_kernels.tools.compile_check --all`` checks every tile; here it is the default tile of
every operator and variant, in a process of its own because this one runs the interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kernels.problem import RANK_CLASSES
from lowrank_kernels.tools import compile_cases, compile_check
from lowrank_kernels.triton_backend import device
from lowrank_kernels.triton_backend.tiles import (
    OPERATORS,
    SPLITS,
    Family,
    best_split,
    default,
    pieces,
    rank_class,
    space,
)


@pytest.mark.slow
def test_default_tiles_compile_without_spills_for_both_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_kernels.tools.compile_check"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(compile_cases.cases(False))} compilations, 0 unsound" in done.stderr
    assert all(f"| {operator} |" in done.stdout for operator in OPERATORS)


def test_all_means_every_tile_of_every_family():
    everything = compile_cases.cases(True)
    assert set(compile_cases.ARCHS) == {80, 86, 89, 90, 100, 120}
    assert set(compile_cases.ARCHS.values()) == set(Family)
    for operator in OPERATORS:
        for rank in RANK_CLASSES if operator != "ffn" else RANK_CLASSES[:-1]:
            for arch, family in compile_cases.ARCHS.items():
                compiled = {
                    c.tile
                    for c in everything
                    if (c.operator, c.rank, c.arch) == (operator, rank, arch)
                }
                assert compiled >= set(space(operator, rank, 2, family))


@pytest.mark.parametrize("rank", [1, 8, 64, 65, 96, 97, 245, 256, 300, 512])
def test_pieces_hold_the_rank(rank):
    a, b = pieces(rank)
    assert (
        a + b == rank_class(rank) >= rank
        and a & (a - 1) == 0
        and (b == 0 or (b & (b - 1) == 0 and b < a))
    )


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_default_tile_is_in_the_space(operator, family):
    for rows in (1, 63, 64, 1000, 10**6):
        for rank in RANK_CLASSES[:-1]:
            tile = default(operator, rank, 2, rows, 768, 3072, 132, family)
            assert replace(tile, splits=1) in space(operator, rank, 2, family)
            assert tile.splits == 1 or operator != "linear_norm"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    programs=st.integers(1, 5000),
    shared=st.integers(1, 4096),
    divided=st.integers(1, 8192),
    processors=st.integers(1, 160),
    limit=st.integers(0, 64),
    merge=st.integers(0, 1000),
)
def test_no_split_takes_less_time_by_whole_waves(
    programs, shared, divided, processors, limit, merge
):
    """Exact arithmetic over all splits: none is faster, and no smaller one as fast."""
    chosen = best_split(programs, shared, divided, processors, limit, merge)
    allowed = [split for split in SPLITS if split <= max(limit, 1)]

    def time(split):
        waves = math.ceil(Fraction(programs * split, processors))
        return waves * (shared + Fraction(divided, split)) + (merge if split > 1 else 0)

    times = {split: time(split) for split in allowed}
    assert chosen in allowed and float(times[chosen]) == float(min(times.values()))


def test_splits_of_common_sizes():
    """4,096 rows on 132 multiprocessors: 128 programs are one wave and 256 two; QKV has three programs a block."""

    def split(*given):
        return default(*given, 768, 768, 132).splits

    assert split("linear", 256, 2, 4096) == 2
    assert split("qkv", 256, 2, 4096) == 1
    assert split("linear", 256, 2, 64) > 2
    assert default("ffn", 256, 2, 64, 768, 3072, 132).splits == 16
    assert default("linear", 256, 2, 65536, 768, 768, 132).splits == 1


@pytest.mark.parametrize(
    "capability, kib, family",
    [
        ((7, 5), 64, None),
        ((8, 0), 163, Family.AMPERE),
        ((8, 6), 99, Family.COMPACT),
        ((8, 9), 99, Family.COMPACT),
        ((9, 0), 227, Family.HOPPER),
        ((10, 0), 227, Family.BLACKWELL),
        ((12, 0), 99, Family.COMPACT_BLACKWELL),
        ((8, 0), 48, None),
    ],
)
def test_every_gpu_has_its_tiles_or_none(capability, kib, family):
    assert device.family_of(capability, kib * 1024) is family


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_check.main([]) == 2 and "unset it" in capsys.readouterr().err
