"""The PTX of the CUDA kernels, executed: tests/csrc/emulator says what is modelled. A few tiles; the driver
``python -m tests.robustness.ptx`` takes all of them, at random sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.csrc.emulator import toolchain
from tests.csrc.emulator.launches import ACTIVATIONS, Launch, Outcome, check, execute
from tests.csrc.emulator.machine import EmulationError
from tests.csrc.emulator.memory import swizzle
from tests.csrc.emulator.ptx import Kernel, kernels

REASON = toolchain.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"PTX cannot be made: {REASON}"),
]

# Beside the infinities, arguments where a GELU is 0 or z to the last bit, and where it is not yet.
SPECIAL = (-np.inf, np.inf, np.nan, -80.0, -40.0, -6.0, 80.0)
# Tails of rows, columns and depth; ranks that the cluster does not fill; a cluster with several row tiles.
LAUNCHES = [
    Launch("linear", (128, 64), (257, 136, 776, 245, 4, 4, 1), "gelu", special_bias=SPECIAL),
    Launch(
        "linear", (128, 64), (1, 8, 8, 40, 1, 1, 1), "gelu_tanh", hidden=False, special_bias=SPECIAL
    ),
    Launch("linear", (128, 64), (385, 72, 136, 40, 2, 1, 1), "relu", bias=False),
    Launch("linear", (128, 64), (129, 200, 264, 100, 2, 2, 1), dtype="f16", base=1040),
    Launch("linear", (64, 512), (150, 72, 200, 500, 1, 1, 2), "gelu_tanh"),
    Launch(
        "linear",
        (64, 512),
        (193, 72, 136, 300, 2, 1, 1),
        "relu",
        infinite_row=70,
        special_bias=SPECIAL,
    ),
    Launch("ffn", (64, 4), (129, 72, 392, 264, 245, 100, 1), "gelu", special_bias=(-np.inf, -80.0)),
    Launch("ffn", (64, 4), (1, 8, 72, 8, 20, 200, 1), "relu", dtype="f16", infinite_row=0),
    Launch("ampere", (128,), (65, 72, 200, 100, 2), "gelu", special_bias=SPECIAL),
    Launch("ampere", (128,), (1, 8, 392, 128, 1), bias=False, hidden=False, dtype="f16"),
]


@pytest.fixture(scope="module")
def run(ptx_folder, trace) -> Callable[..., Outcome]:
    """Executes a launch, by its tile's kernels or by given ones, and checks its results."""

    def execute_and_check(launch: Launch, program: Sequence[Kernel] | None = None) -> Outcome:
        program = program or toolchain.kernels_of(launch.file, ptx_folder)
        outcome = execute(launch, program, trace)
        check(outcome)
        return outcome

    return execute_and_check


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.file}{launch.sizes}")
def test_results_of_a_launch(run, launch):
    run(launch)


def test_the_launches_have_every_activation_and_both_types():
    assert {launch.activation for launch in LAUNCHES} == set(ACTIVATIONS)
    assert {(launch.kind, launch.dtype) for launch in LAUNCHES} == {
        (kind, dtype) for kind in ("linear", "ffn", "ampere") for dtype in ("bf16", "f16")
    }


def test_results_do_not_depend_on_the_order(run):
    """Equal to the bit, however copies, arrivals and warpgroups fall."""
    sizes = (129, 72, 264, 100, 130, 200, 1)
    first, second = (run(Launch("ffn", (64, 4), sizes, order=order)).matrices for order in (1, 2))
    assert all(np.array_equal(first[name].values, second[name].values) for name in first)


def _changed(pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    def change(text: str) -> str:
        text, changes = re.subn(pattern, replacement, text, count=count)
        assert changes, f"the PTX has no {pattern}"
        return text

    return change


def _descriptors(keep: int, new: int) -> Callable[[str], str]:
    """Changes the constant that holds a descriptor's layout: 128-byte swizzle, groups of 8 rows 64 x 16 bytes apart."""
    layout = 0x40000040 << 32

    def change(text: str) -> str:
        changed = text.replace(str(layout | 1 << 16), str(_signed(layout & keep | new | 1 << 16)))
        assert changed != text, "the PTX has no descriptor of that layout"
        return changed

    return change


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


MUTATIONS = {
    "no proxy fence": _changed(r"fence\.proxy\.async\.shared::cta;", ""),
    "no proxy fence after the first product": _changed(r"fence\.proxy\.async\.shared::cta;", "", 1),
    "no wait for the source of a store": _changed(r"cp\.async\.bulk\.wait_group\.read 0;", ""),
    "groups of 8 rows half as far apart": _descriptors(~(0x40 << 32), 0x20 << 32),
    "swizzle of 64 bytes": _descriptors(~(3 << 62), 2 << 62),
    "two products under way instead of one": _changed(
        r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"
    ),
    "one product under way instead of none": _changed(
        r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"
    ),
    "no bound on the argument of GELU": _changed("0f41800000", "0f7F800000"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_seen(run, ptx_folder, name):
    launch = Launch(
        "linear", (128, 64), (257, 200, 776, 245, 4, 4, 1), "gelu", special_bias=SPECIAL, seed=2
    )
    text = MUTATIONS[name](toolchain.ptx_text(launch.file, ptx_folder))
    with pytest.raises(EmulationError):
        run(launch, kernels(text))


@pytest.mark.parametrize("file", ["linear_128_64_sm90a", "ffn_64_4_sm90a"])
def test_hopper_kernels_divide_no_integers(ptx_folder, file):
    """A division takes the loading thread about as long as the rest of its step."""
    assert not re.search(r"\b(div|rem)\.[su]", toolchain.ptx_text(file, ptx_folder))


def test_swizzle_is_that_of_the_headers(trace):
    """The emulator's and schedule.h's, of every element of a tile of 64 rows."""
    import cuda_simulator

    for pitch, _, row, column, _, right in (
        map(int, line) for line in cuda_simulator.run_trace(trace, "index")
    ):
        tile, inside = divmod(column, pitch // 2)
        plain = np.int64(tile * 64 * pitch + row * pitch + inside * 2)
        assert swizzle(plain, pitch) == right
