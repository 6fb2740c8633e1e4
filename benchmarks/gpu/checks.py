"""The long checks, last: the tests on this GPU, the CUDA C++ kernels, and sanitizers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
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
    "test_cuda_gpu",
    "test_operators",
    "test_gradients",
    "test_modules",
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
    """The operators' tests; one result with the counts, one for each test that fails."""
    if "tests" in setting.results.known():
        return
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    files = [f"tests/lowrank_kernels/{name}.py" for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *parallel]
        code, tail = _run(setting, [sys.executable, "-m", "pytest", *options, *files])
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            wrong = next((e for e in case if e.tag in ("failure", "error")), None)
            if wrong is not None:
                name = f"tests/{case.get('classname')}/{case.get('name')}"
                message = str(wrong.get("message"))[:400]
                setting.results.add(name, ok=False, error=message)
            skipped = any(element.tag == "skipped" for element in case)
            counts["failed" if wrong is not None else "skipped" if skipped else "passed"] += 1
    setting.results.add("tests", ok=code == 0, code=code, tail=tail[-200:], **counts)


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
        for name in ("triton", "cuda")
        if get_backend(name).why_not_on(torch.device("cuda", 0)) is None
    ]
    for tool in ("memcheck", "racecheck", "synccheck"):
        if f"sanitizer/{tool}" in setting.results.known() or setting.late(20):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = ["--device", "cuda", "--sanitizer", tool, "--calls", "25", "--minutes", "1"]
            options += ["--backends", *backends, "--output", f"{folder}/{tool}.jsonl"]
            command = [sys.executable, "-m", "tests.robustness.operators", *options]
            code, tail = _run(setting, command)
        setting.results.add(f"sanitizer/{tool}", ok=code == 0, code=code, tail=tail)
