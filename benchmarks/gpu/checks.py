"""The long checks, last: the tests on this GPU, the CUDA C++ kernels, and sanitizers."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import torch

from lowrank_kernels.backends import get_backend

from . import correct
from .results import Setting

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "test_gpu",
    "test_norm",
    "test_attention",
    "test_cuda_gpu",
    "test_operators",
    "test_operator_layouts",
    "test_gradients",
    "test_modules",
)


# A line of pytest's: the outcome comes first where tests run in parallel. The summary at the end has no percentage.
OUTCOME = re.compile(
    r"^(\[gw\d+\] \[ *\d+%\] (?P<before>[A-Z]+) )?tests/lowrank_kernels/(?P<name>\S.*?)"
    r"( (?P<after>PASSED|FAILED|ERROR|SKIPPED)\b.*%\])? *$"
)


def _run(setting: Setting, command: list[str], **environment: str) -> tuple[int | None, str]:
    """Exit code (None: out of time) and the last lines of a command."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(1.0, setting.deadline - time.time()),
        )
    except subprocess.TimeoutExpired:
        return None, ""
    print(done.stdout[-4000:], done.stderr[-4000:])
    return done.returncode, (done.stdout + done.stderr)[-600:]


def run_tests(setting: Setting) -> None:
    """The operators' tests: a result at once for each test that fails, and the counts, also if time runs out."""
    if "tests" in setting.results.known():
        return
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    files = [f"tests/lowrank_kernels/{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *parallel, *files]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # With all its workers.
    left = max(1.0, setting.deadline - time.time())
    stop = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))
    stop.start()
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        found = OUTCOME.search(line)
        outcome = (found["before"] or found["after"] or "").lower() if found else ""
        if found is None or outcome not in counts:
            continue
        counts[outcome] += 1
        if outcome in ("failed", "error"):
            setting.results.add(f"tests/{found['name']}", ok=False, error=outcome)
    code = process.wait()
    stop.cancel()
    setting.results.add("tests", ok=code == 0, code=code, finished=code >= 0, **counts)


def _build(setting: Setting) -> str | None:
    """Compile the CUDA kernels for this GPU into the package's folder, offline; what is in the way, or None."""
    missing = [
        name
        for name in ("scikit_build_core", "pybind11", "cutlass_library")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        return f"cannot build without {', '.join(missing)}"
    archs = {8: "80", 9: "90a"}.get(torch.cuda.get_device_capability()[0])
    if archs is None:
        return "there are no CUDA kernels for this GPU"
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, "."]
        command = [sys.executable, "-m", "pip", "wheel", *options]
        code, tail = _run(setting, command, LOWRANK_CUDA_ARCHS=archs)
        wheels = list(Path(folder).glob("*.whl"))
        if code != 0 or not wheels:
            return f"the build failed: {tail[-300:]}"
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                built = name.startswith("lowrank_kernels/_cuda") or name.endswith("/build.json")
                if built or name.endswith("/ptxas.txt"):
                    wheel.extract(name, ROOT)
    return None


def run_cuda(setting: Setting) -> None:
    """Build the CUDA kernels where that is still to be done; the next stages use them."""
    device = torch.device("cuda", 0)
    reason = get_backend("cuda").why_not_on(device)
    if reason is not None:
        reason = _build(setting)
    setting.results.add("cuda", ok=reason is None, error=reason)


def run_cuda_correct(setting: Setting) -> None:
    """The cases of ``correct`` for the CUDA kernels."""
    correct.run(setting, "cuda")


def run_sanitizers(setting: Setting) -> None:
    """Random calls under compute-sanitizer: stray accesses, then races, then barriers."""
    if shutil.which("compute-sanitizer") is None:
        setting.results.add("sanitizers", ok=None, error="compute-sanitizer is not on PATH")
        return
    backends = [
        name
        for name in ("cuda", "triton")
        if get_backend(name).why_not_on(torch.device("cuda", 0)) is None
    ]
    # Each backend by itself, the kernels with barriers of their own first; few calls, because each takes long.
    for tool, name in itertools.product(("racecheck", "memcheck", "synccheck"), backends):
        if f"sanitizer/{tool}/{name}" in setting.results.known() or setting.late(15):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = ["--device", "cuda", "--sanitizer", tool, "--calls", "12", "--minutes", "0.3"]
            options += ["--backends", name, "--output", f"{folder}/{tool}.jsonl"]
            command = [sys.executable, "-m", "tests.robustness.operators", *options]
            begin = time.time()
            code, tail = _run(setting, command)
        seconds = time.time() - begin
        setting.results.add(
            f"sanitizer/{tool}/{name}", ok=code == 0, code=code, tail=tail, seconds=seconds
        )
