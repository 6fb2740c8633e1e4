"""Calibration: a model's own problems measured on this GPU, once, before the first request.

Which of a GPU's kernels is the fastest, and whether a kernel is right on it, only that GPU can tell. So the inference
form of a model hands its problems to ``calibrate`` when it is made. Each is measured at a few numbers of rows, eager
and in a CUDA graph, for two library matmuls, merged and stacked factors, and the likely tiles of every kernel. A
candidate whose results differ from two matmuls is left out with a warning. What was measured is kept in the user's
cache for this GPU and these versions (``tuning.calibration_file``), where ``backend="auto"`` reads it.
``LOWRANK_KERNELS_CALIBRATE=0`` turns it off.

The measuring is done by ``tools.worker`` in a process of its own: a kernel that breaks the GPU or hangs takes that
process with it, is left out, and the rest continues.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import dispatch, env, tuning
from .problem import Problem

ENVIRONMENT = "LOWRANK_KERNELS_CALIBRATE"
# Numbers of rows that are measured; a call takes what was measured at the nearest.
ROWS = (32, 128, 512, 4096, 16384)
# Seconds of timing for each candidate, about.
BUDGET = 0.005
# Seconds without a word after which the measuring process is taken for hanging.
PATIENCE = 120.0
# Candidates that may break or hang before the rest is given up.
MOST_BROKEN = 16

Event = dict[str, Any]


class MeasuringError(RuntimeError):
    """Nothing could be measured. The text is one line."""


def is_on() -> bool:
    """Whether calibration is wanted."""
    return os.environ.get(ENVIRONMENT, "1") not in ("0", "")


def calibrate(problems: Iterable[Problem], device: torch.device) -> None:
    """Measure what is missing of some problems on a GPU, for all later calls with ``backend="auto"``.

    Nothing happens on another device, where calibration is turned off, where a backend is asked for by name, or while a
    CUDA graph is captured. What goes wrong is one warning: calls then use what was known before.

    Args:
        problems: their rows do not count; each is measured at ``ROWS``.
        device: where they will run.
    """
    if device.type != "cuda" or not is_on() or dispatch.override() != "auto":
        return
    wanted = [problem._replace(rows=rows) for problem in problems for rows in ROWS]
    if not wanted or dispatch.capturing(device):
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    path = tuning.calibration_file(tuning.gpu(index))
    try:
        measure_missing(wanted, index, path, budget=BUDGET, quick=True)
    except (MeasuringError, tuning.TableError, OSError) as error:
        warnings.warn(
            f"this GPU was not calibrated: {error} ({ENVIRONMENT}=0 turns calibration off)",
            stacklevel=2,
        )
        return
    # Also where another process has measured.
    dispatch.refresh()


def measure_missing(
    problems: Iterable[Problem],
    index: int,
    path: Path,
    *,
    budget: float,
    quick: bool,
    start: Callable[[Event], Iterator[Event]] | None = None,
) -> int:
    """Measure the problems that a table file lacks, and add each to it as it comes.

    A process that finds another one at work on the same file waits for it and measures what is left.

    Args:
        problems: of one key (``tuning.key``) the first is measured.
        index: of the GPU.
        path: the table file.
        budget: seconds of timing for each candidate, about.
        quick: the likely candidates only.
        start: takes a request and gives the events of a measuring process (see ``tools.worker``); for tests.

    Returns:
        How many were measured.

    Raises:
        MeasuringError: the measuring process cannot run.
        TableError: the file is damaged.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        entries = tuning.measured(path)
        missing: dict[str, Problem] = {}
        for problem in problems:
            if tuning.key(problem) not in entries:
                missing.setdefault(tuning.key(problem), problem)
        skip: dict[str, list[str]] = {}
        left, count = dict(missing), 0
        while left:
            begun: tuple[str, str] | None = None
            for event in (start or _worker_events)(_request(left, index, budget, quick, skip)):
                kind, key, value = event["event"], event["about"], event["value"]
                if kind == "begin":
                    begun = (key, value)
                elif kind == "warning":
                    _line(f"\n{key}\n")
                elif kind == "failed":
                    left.pop(key)
                elif kind == "entry":
                    entries[key] = value
                    tuning.write(path, tuning.gpu(index), env.describe(), entries)
                    left.pop(key)
                    count += 1
                    _progress(len(missing) - len(left), len(missing), key)
                elif kind == "ended":
                    if not left:
                        break
                    if begun is None or sum(map(len, skip.values())) >= MOST_BROKEN:
                        raise MeasuringError(key)
                    key, label = begun
                    if label in skip.get(key, ()):
                        raise MeasuringError(f"{label} broke the GPU or hung")
                    skip.setdefault(key, []).append(label)
                    _line(f"\n{key}: {label} broke the GPU or hung, and is left out\n")
        if missing:
            _line("\n")
        return count


def _request(
    problems: dict[str, Problem], index: int, budget: float, quick: bool, skip: dict[str, list[str]]
) -> Event:
    listed = [
        [*problem[:5], str(problem.dtype).removeprefix("torch."), problem.hidden]
        for problem in problems.values()
    ]
    request = {"device": f"cuda:{index}", "budget": budget, "quick": quick}
    return {**request, "skip": skip, "problems": listed}


def _line(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _progress(done: int, total: int, key: str) -> None:
    filled = 30 * done // total
    _line(f"\rmeasuring this GPU [{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {key:40}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where the system has no such lock, all of them."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _worker_events(request: Event) -> Iterator[Event]:
    """What a measuring process says, and how it ended."""
    # It must import what this process runs, from wherever that came.
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowrank_kernels.tools.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(PATIENCE, process.kill)
        try:
            timer.start()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                timer.cancel()
                if line.startswith('{"event"'):
                    yield json.loads(line)
                timer = threading.Timer(PATIENCE, process.kill)
                timer.start()
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    reason = said[-1][:200] if said else f"it ended with code {code}"
    yield {"event": "ended", "about": f"the measuring process failed: {reason}", "value": code}
