"""What the build made of the CUDA kernels, read from the built module: instructions, registers, spills, warnings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lowrank_kernels.cuda_backend import build

REASON = build.why_not_built()
built = pytest.mark.skipif(REASON is not None, reason=f"the CUDA kernels are {REASON}")
# What a thread may have: the launch bounds' share in the code that all warps run, setmaxnreg's for consumers.
REGISTERS = {"80": 255, "90a": 168}
CONSUMER_REGISTERS = 232
EXPECTED = {"80": 2 * 2, "90a": (9 + 6) * 2}
# In the name of a kernel of no instructions, for asking how many clusters fit.
PROBE = "alone"


def _cuobjdump(*options: str) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [tool, *options, build.module().__file__], capture_output=True, text=True, check=True
    ).stdout


def _functions(text: str) -> dict[tuple[str, str], str]:
    """The text of every kernel by (architecture, name)."""
    found = {}
    for section in re.split(r"(?m)^Fatbin elf code:", text)[1:]:
        arch = re.search(r"arch = sm_(\w+)", section).group(1)
        for name, body in re.findall(
            r"Function\s*:?\s*(_Z\w+):?\s*\n(.*?)(?=\n\s*Function|\Z)", section, re.DOTALL
        ):
            if PROBE not in name:
                found[arch, name] = body
    return found


@pytest.mark.slow
@built
def test_kernels_use_the_tensor_cores_and_no_local_memory():
    code = _functions(_cuobjdump("-sass"))
    assert Counter(arch for arch, _ in code) == {
        arch: EXPECTED[arch] for arch in build.module().archs
    }
    for (arch, name), body in code.items():
        opcodes = Counter(
            word.split(".")[0] for word in re.findall(r"\b([A-Z][A-Z0-9]+(?:\.[\w]+)*) ", body)
        )
        assert not opcodes["LDL"] and not opcodes["STL"], f"{name} spills"
        if arch == "90a":
            assert (
                opcodes["HGMMA"] and opcodes["UTMALDG"] and opcodes["UTMASTG"] and opcodes["UBLKCP"]
            ), name
            assert opcodes["USETMAXREG"] == 2, name
            assert max(map(int, re.findall(r"\bR(\d+)\b", body))) < CONSUMER_REGISTERS, name
            assert "MULTICAST" in body, name
        else:
            assert (
                opcodes["HMMA"] and opcodes["LDSM"] and opcodes["LDGSTS"] and not opcodes["HGMMA"]
            ), name


@built
def test_registers_and_static_memory_are_in_the_budget():
    usage = _functions(_cuobjdump("-res-usage"))
    assert len(usage) == sum(EXPECTED[arch] for arch in build.module().archs)
    for (arch, name), body in usage.items():
        numbers = {
            key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", body)
        }
        assert numbers["REG"] <= REGISTERS[arch] and numbers["STACK"] == numbers["LOCAL"] == 0, (
            name,
            numbers,
        )
        # Dynamic shared memory is checked from the headers; what is static comes on top of it.
        assert numbers["SHARED"] <= 1024, (name, numbers)


@built
def test_the_assembler_complained_of_nothing():
    log = (build.files() / "ptxas.txt").read_text(encoding="utf-8")
    compiled = re.findall(r"Compiling entry function '(\w+)'", log)
    assert sum(PROBE not in name for name in compiled) == sum(
        EXPECTED[arch] for arch in build.module().archs
    )
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    for complaint in ("setmaxnreg", "serialized", "C7510", "C7512", "warning"):
        assert complaint not in log, complaint


@pytest.mark.slow
@built
def test_the_module_loads_without_a_gpu_and_says_so():
    """In a process that sees no GPU, whatever this machine has."""
    program = (
        "import lowrank_kernels._cuda as m, json;"
        "x = (16, 8, 8, 8); none = (0, 0, 0, 0);"
        "print(json.dumps([m.devices(), m.linear(x, x, x, 0, x, none, 8, 0, 0, 0, 0, 0, 0, 0),"
        " m.linear(x, x, x, 0, x, none, 9, 0, 0, 0, 0, 0, 0, 0),"
        " m.linear((8, 8, 8, 8), x, x, 0, x, none, 8, 0, 0, 0, 0, 0, 0, 0)]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    (count, reason), refused, rank, address = json.loads(done.stdout)
    assert count == 0 and reason.startswith("no device")
    assert refused[0] == 2 and rank == [1, "rank is outside the padded factors"]
    assert address[0] == 1 and "16 bytes" in address[1]


@pytest.mark.skipif(REASON is None, reason="the CUDA kernels are built")
def test_an_installation_without_kernels_says_why():
    assert REASON.startswith("not built: ") and len(REASON) > 20
