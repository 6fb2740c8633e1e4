"""Part of the tuning space through the real compilers, for GPUs that are not here.

The command ``python -m lowrank_kernels.tools.compile_check --all`` checks every tile; here it is the default tile of every
operator and variant, in a process of its own because this one runs the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lowrank_kernels.problem import RANK_CLASSES
from lowrank_kernels.tools import compile_check
from lowrank_kernels.triton_backend.tiles import (
    OPERATORS,
    default,
    pieces,
    rank_class,
    space,
)


def test_default_tiles_compile_without_spills_for_both_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_kernels.tools.compile_check"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(compile_check.cases(False))} compilations, 0 unsound" in done.stderr
    assert all(f"| {operator} |" in done.stdout for operator in OPERATORS)


def test_all_means_every_tile_on_both_gpus():
    everything = compile_check.cases(True)
    for operator in OPERATORS:
        for rank in RANK_CLASSES if operator != "ffn" else RANK_CLASSES[:-1]:
            for arch in (80, 90):
                compiled = {
                    c.tile
                    for c in everything
                    if (c.operator, c.rank, c.arch) == (operator, rank, arch)
                }
                assert compiled >= set(space(operator, rank, 2, arch == 90))


@pytest.mark.parametrize("rank", [1, 8, 64, 65, 96, 97, 245, 256, 300, 512])
def test_pieces_hold_the_rank(rank):
    a, b = pieces(rank)
    assert (
        a + b == rank_class(rank) >= rank
        and a & (a - 1) == 0
        and (b == 0 or b & (b - 1) == 0 and b < a)
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_default_tile_is_in_the_space_and_fills_the_gpu(operator):
    for rows in (1, 63, 64, 1000, 10**6):
        for rank in RANK_CLASSES:
            tile = default(operator, rank, 2, rows, units=48, processors=132)
            assert replace(tile, splits=1) in space(operator, rank, 2)
            programs = -(-rows // tile.block_m) * tile.splits
            assert programs >= 132 or tile.splits == 16 or operator == "linear_norm"


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_check.main([]) == 2 and "unset it" in capsys.readouterr().err
