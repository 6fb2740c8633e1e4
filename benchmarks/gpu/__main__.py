"""Everything that only a GPU can tell, the most valuable first.

    python -m benchmarks.gpu [--output FOLDER] [--minutes 13] [--ahead FILE] [STAGE ...]

Run it from the repository's root, with an interpreter whose torch sees the GPU; nothing is installed and no network is
used. A GPU of a kind that has not run before gets all stages, in their order; ``next`` stands for those that the visits
to an H100 and an H200 left. Each has a time limit, and what one loses the next does not. Every result is a line of
``results.jsonl``, written at once; run again with the same folder, and what it holds of this commit is not measured
again. The folder (``$OUT`` where that is set) gets three files: results, a log, and the table that calibration made.
Where the tree is no git checkout, name the commit in the environment variable ``COMMIT``.

Bring what can be made without the GPU: Triton's kernels by ``python -m benchmarks.gpu.ahead FOLDER``, in an environment
with the versions of the GPU's machine, and the built module ``lowrank_kernels/_cuda*.so``; without that the stage
``cuda`` builds it, where nvcc, scikit-build-core, pybind11 and the CUTLASS headers are.

Without a GPU it is a rehearsal: toy sizes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import ahead
from .results import TOY, Results, Setting

RESULTS, LOG, TABLE = "results.jsonl", "log.txt", "calibration.json"
# Seconds that a stage has beyond its deadline, to end by itself.
GRACE = 8.0
# With less than this left no stage is begun.
LEAST = 20.0


class Stage(NamedTuple):
    """A stage: what it runs (module and function here), the seconds it may take, and whether a rehearsal has it."""

    module: str
    function: str
    seconds: float
    rehearsed: bool = True


STAGES = {
    "correct": Stage("correct", "run", 110),
    "micro": Stage("micro", "run", 100),
    "encoders": Stage("encoders", "run", 120),
    "attention": Stage("attention", "run", 40),
    "calibration": Stage("training", "run_calibration", 110),
    "units": Stage("encoders", "run_units", 60),
    "graphs": Stage("graphs", "run", 60),
    "table": Stage("encoders", "run_by_table", 60),
    "training": Stage("training", "run", 60),
    "compiled": Stage("encoders", "run_compiled", 110, False),
    "cuda": Stage("checks", "run_cuda", 240, False),
    "cuda-correct": Stage("checks", "run_cuda_correct", 60, False),
    "clusters": Stage("clusters", "run", 60, False),
    "sweep": Stage("sweep", "run", 60, False),
    "tests": Stage("checks", "run_tests", 110, False),
    "sanitizers": Stage("checks", "run_sanitizers", 120, False),
}
# What the visits to an H100 and an H200 left, the most valuable first.
NEXT = ("tests", "graphs", "calibration", "table", "sanitizers", "training", "sweep")


def stage_function(stage: Stage) -> Callable[[Setting], None]:
    """A stage's function; importing it imports torch and more."""
    from importlib import import_module

    return getattr(import_module(f"benchmarks.gpu.{stage.module}"), stage.function)


def run_limited(command: list[str], seconds: float, log: Path) -> str:
    """Run a command for at most so long, its output into the log, and say how it ended; its children end with it."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = process.wait(seconds)
            outcome = "done" if code == 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome


def _environment(folder: Path) -> None:
    """What the stages' processes run under: a cache of compiled kernels and of the table that is kept between runs."""
    work = Path(tempfile.gettempdir()) / "lowrank-gpu"
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    os.environ["LOWRANK_KERNELS_CACHE"] = str(work / "cache")
    # Only the stage of that name calibrates: before it the choice must not depend on an earlier run.
    os.environ["LOWRANK_KERNELS_CALIBRATE"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONUNBUFFERED"] = "1"


def _keep_table(folder: Path, bring: bool) -> None:
    """Copy the calibration's table from the folder to the cache that the stages use (``bring``), or back."""
    import torch

    from lowrank_kernels import tuning

    if not torch.cuda.is_available():
        return
    cached, kept = tuning.calibration_file(tuning.gpu(0)), folder / TABLE
    source, target = (kept, cached) if bring else (cached, kept)
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def inside(name: str, folder: Path, seconds: float, rehearsal: bool) -> int:
    """What a stage's own process does."""
    sizes = TOY if rehearsal else {}
    setting = Setting(Results(folder / RESULTS), time.time() + seconds, **sizes)
    if not rehearsal:
        _keep_table(folder, bring=True)
    stage_function(STAGES[name])(setting)
    return 0


def summary(results: Results) -> str:
    """What the run found, in some lines."""
    known = results.known()
    wrong = [key for key, one in known.items() if one.get("ok") is False]
    right = sum(one.get("ok") is True for one in known.values())
    lines = [f"{right} checks right, {len(wrong)} wrong"]
    lines += [f"  wrong: {key}: {str(known[key].get('error'))[:160]}" for key in wrong[:12]]
    for key, one in known.items():
        if key.startswith("micro/") and "rivals" in one:
            times = {n: r["ms"] * 1e3 for n, r in one["rivals"].items() if "ms" in r}
            ordered = sorted(times.items(), key=lambda item: item[1])
            lines.append(f"  {key}: " + ", ".join(f"{n} {t:.1f}" for n, t in ordered[:5]) + " us")
        if "rows" in one:
            ordered = sorted(one["rows"].items(), key=lambda item: item[1]["ms"])
            best = [f"{n} {r['ms']:.3g} ms ({r['over_best_dense']:.2f}x)" for n, r in ordered[:5]]
            lines.append(f"  {key}: " + "; ".join(best))
        if key in ("tests", "cuda") or key.startswith(("stage/", "calibration/", "training/")):
            shown = {n: v for n, v in one.items() if n not in ("gpu", "driver", "torch", "triton")}
            lines.append(f"  {shown}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; or next"
    )
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--minutes", type=float, default=13.0, help="for all stages together")
    parser.add_argument("--ahead", type=Path, help="archive of benchmarks.gpu.ahead")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stages == ["next"]:
        options.stages = list(NEXT)
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {min(unknown)}; choose from {', '.join(STAGES)}")
    if options.ahead is not None and not options.ahead.exists():
        parser.error(f"{options.ahead} does not exist; benchmarks.gpu.ahead makes it")
    import torch

    rehearsal = not torch.cuda.is_available()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.inside is not None:
        return inside(options.stages[0], folder, options.inside, rehearsal)
    _environment(folder)
    if rehearsal:
        print("torch sees no GPU: a rehearsal at toy sizes, in Triton's interpreter")
        os.environ["TRITON_INTERPRET"] = "1"
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    cache.mkdir(parents=True, exist_ok=True)
    if options.ahead is not None:
        print(f"{ahead.bring(options.ahead, cache)} compiled kernels and launchers brought")
    results, end = Results(folder / RESULTS), time.time() + 60 * options.minutes
    names = options.stages or [n for n, s in STAGES.items() if s.rehearsed or not rehearsal]
    for name in names:
        seconds = min(STAGES[name].seconds, end - time.time() - GRACE)
        if seconds < LEAST:
            print(f"{name}: no time left")
            continue
        begin, before = time.time(), len(list(cache.iterdir()))
        command = [sys.executable, "-m", "benchmarks.gpu", name, "--output", str(folder)]
        command += ["--inside", str(seconds)]
        outcome = run_limited(command, seconds + GRACE, folder / LOG)
        if not rehearsal:
            # Here, because a stage that was stopped has measured something too.
            _keep_table(folder, bring=False)
        # Kernels and launchers, by whatever process; what was brought or known is not among them.
        compiled = len(list(cache.iterdir())) - before
        seconds = time.time() - begin
        results.add(f"stage/{name}", outcome=outcome, seconds=seconds, compiled=compiled)
        print(f"{name}: {outcome} ({seconds:.0f} s, {compiled} compiled)", flush=True)
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
