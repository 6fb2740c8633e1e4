"""Launches that skip Triton's binder hand over what Triton itself would; compiled for sm_90, launched by a stub.

In a process of its own, because this one runs the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from triton import knobs

from benchmarks import host_path
from lowrank_kernels import backends
from lowrank_kernels.triton_backend import launch
from lowrank_kernels.triton_backend.linear import linear_kernel

seen = []
stub = host_path.install()
stub.launcher_cls = lambda source, metadata: lambda *given: seen.append(given)


def normal(*shape):
    return torch.randn(*shape).half()


x, factors = normal(64, 32), (normal(16, 32), normal(48, 16), normal(48), "gelu")
plan = backends.bind("triton", "linear", factors)
with launch.compile_ahead():
    plan(x)
compiled = linear_kernel.device_caches[0][0]
assert not seen and len(compiled) == 1, "compiled ahead, and not launched"
results = [plan(x)[0] for _ in range(2)]
hook = lambda metadata: None
knobs.runtime.launch_enter_hook.add(hook)
results.append(plan(x)[0])
knobs.runtime.launch_enter_hook.remove(hook)
assert len(compiled) == 1 and len(seen) == 3 and len(launch._compiled) == 1


def arguments(given, y):
    # Grid, stream, function, metadata; not what is for profilers; then the kernel's own, y by its place.
    values = [value.data_ptr() if torch.is_tensor(value) else value for value in given]
    return values[:6], ["y" if value == y.data_ptr() else value for value in values[9:]]


first, second, watched = (arguments(*pair) for pair in zip(seen, results))
assert first == second == watched, (first, second, watched)
assert first[1][0] == x.data_ptr() and first[1].count("y") == 1
assert seen[1][6:9] == (None, None, None) and seen[2][6] is not None

# An address that no 16 bytes divide is left to Triton, which compiles another form.
plan(torch.randn(64 * 32 + 1).half()[1:].view(64, 32))
assert len(compiled) == 2 and len(launch._compiled) == 1
print("right")
"""


@pytest.mark.slow
def test_a_kept_launch_hands_over_what_triton_would():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": root},
    )
    assert done.stdout == "right\n", done.stderr
