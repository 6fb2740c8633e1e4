"""Kill it anywhere: ``python -m tests.robustness.kill`` stops the main job at 50 random moments and continues it.

First the job runs uninterrupted. Then it runs again and again, each time into a fresh folder with a fresh teacher
cache: it is stopped by SIGKILL at a moment in each of several stages, early ones first, started again after each, and
at last left to end. Every end must equal the first to the bit (both models, plan, spectra, metrics) and leave nothing
temporary behind. Last come SIGINT and SIGTERM, after which the process must say in one line how to continue.

A moment is a share of a stage's time, or the appearance of a file, temporary ones included, plus some milliseconds.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.records import save_record, suite_file
from bert_decomp.errors import UserError
from bert_decomp.io.environment import environment
from bert_decomp.io.json import read_json
from bert_decomp.pipeline.run_folder import STAGES

from .job import Attempt, Job

# Of each stage, files whose appearance is a moment; relative to the job's folder.
FILES = {
    "start": ("run/.partial-run.json-*", "run/run.json"),
    "teacher": (
        "cache/teachers/*-training/checkpoint-2/model.safetensors",
        "cache/teachers/*-training/checkpoint-*/optimizer.pt",
        "cache/teachers/*-training/checkpoint-4/trainer_state.json",
        "cache/teachers/.partial-*",
        "cache/teachers/.partial-*/model.safetensors",
        "cache/teachers/*/tokenizer.json",
    ),
    "statistics": (
        "run/.partial-statistics.partial-*",
        "run/statistics.partial",
        "run/.partial-statistics.safetensors-*",
        "run/statistics.safetensors",
    ),
    "decompose": (
        "run/.partial-plan.json-*",
        "run/plan.json",
        "run/.partial-spectra.json-*",
        "run/.partial-decomposed-*",
        "run/.partial-decomposed-*/model.safetensors",
        "run/decomposed",
    ),
    "distil": (
        "run/checkpoints/checkpoint-2/model.safetensors",
        "run/checkpoints/checkpoint-*/optimizer.pt",
        "run/checkpoints/checkpoint-4/trainer_state.json",
        "run/checkpoints/checkpoint-4/files.json",
        "run/distillation_log.json",
        "run/.partial-model-*",
        "run/.partial-model-*/model.safetensors",
        "run/model",
    ),
    "report": (
        "run/.partial-results.json-*",
        "run/results.json",
        "run/.partial-report.md-*",
        "run/report.md",
        "run/.partial-report.html-*",
    ),
}


@dataclass
class Stop:
    """One signal: aimed at a ``stage``'s ``share`` of its time or ``delay`` seconds after ``file`` appears."""

    stage: str
    share: float | None
    file: str | None
    delay: float
    signal: str = "SIGKILL"
    hit: str | None = None  # the stage that the process was in
    after: float | None = None  # seconds from its start


def draw_stop(draw: random.Random, stage: str) -> Stop:
    """Half of the moments are aimed at files, where the stage has any."""
    if stage in FILES and (stage == "start" or draw.random() < 0.5):
        return Stop(
            stage, None, draw.choice(FILES[stage]), draw.choice((0.0, draw.uniform(0, 0.05)))
        )
    return Stop(stage, draw.random(), None, 0.0)


def wait_for(attempt: Attempt, stop: Stop, folder: Path, seconds: dict[str, float]) -> bool:
    """Wait for a stop's moment; whether it came before the process ended."""
    reached, order = None, ("start", *STAGES)
    while attempt.process.poll() is None:
        if stop.file is not None:
            if any(folder.glob(stop.file)):
                time.sleep(stop.delay)
                break
            if order.index(attempt.stage) > order.index(stop.stage):
                break  # the file was there for less time than a look takes
        elif reached is None and order.index(attempt.stage) >= order.index(stop.stage):
            reached = time.perf_counter()
        if (
            reached is not None
            and time.perf_counter() - reached >= stop.share * seconds[stop.stage]
        ):
            break
        time.sleep(0.001)
    return attempt.process.poll() is None


def chain(
    job: Job, stops: Sequence[Stop], seconds: dict[str, float], warm: bool = False
) -> list[str]:
    """Start the job, stop it at each moment in turn, at last let it end; what went wrong.

    A file that an earlier attempt left is no moment; half of its stage's time takes its place.

    Args:
        warm: the processes are forked from one that has imported everything.
    """
    faults = []
    for stop in stops:
        if stop.file is not None and any(job.folder.glob(stop.file)):
            stop.share, stop.file = 0.5, None
        attempt = job.start(warm=warm)
        if not wait_for(attempt, stop, job.folder, seconds):
            if attempt.wait() != 0:
                faults.append(f"ended by itself: {attempt.errors[-1:]}")
            continue
        stop.hit, stop.after = attempt.stage, round(attempt.seconds, 2)
        number = signal.Signals[stop.signal]
        attempt.send(number)
        tqdm.write(f"{stop.signal} in {stop.hit} after {stop.after} s")
        code = attempt.wait(120)
        if number == signal.SIGKILL or code == 0:  # 0: it had just ended
            stop.hit = None if code == 0 else stop.hit
            continue
        if (
            code != 2
            or "continues from here" not in attempt.errors[-1]
            or any("Traceback" in line for line in attempt.errors)
        ):
            faults.append(f"{stop.signal} in {stop.hit}: code {code}, said {attempt.errors[-3:]}")
    last = job.start(warm=warm)
    if last.wait() != 0:
        faults.append(f"the last start failed: {last.errors[-1:]}")
    return faults


def compare(job: Job, expected: dict[str, Any]) -> list[str]:
    """How a job that has ended differs from ``expected``, and what it left behind."""
    faults = [f"left behind: {job.leftovers()}"] if job.leftovers() else []
    try:
        found = job.result()
    except (OSError, UserError) as error:
        return [*faults, f"no result: {error}"]
    return faults + [f"{name} differs" for name, value in expected.items() if found[name] != value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=6, help="SIGINT and SIGTERM in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="an interpreter of its own for every process, as the "
        "uninterrupted one has it; else they are forked from one that has imported everything",
    )
    parser.add_argument(
        "--reference", type=Path, help="folder of an uninterrupted run that an earlier soak left"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the jobs run (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    draw = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    found = soak(root, draw, options)
    if found["failures"]:
        raise SystemExit(f"{len(found['failures'])} failures; {root} is kept")
    shutil.rmtree(root)


def soak(root: Path, draw: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    """The reference, the chains of kills and the signals; what goes into the result file."""
    whole = Job(options.reference or root / "whole")
    if options.reference is None and (attempt := whole.start()).wait(1800) != 0:
        raise SystemExit(f"the uninterrupted run failed: {attempt.errors[-3:]}")
    expected = whole.result()
    seconds = read_json(whole.out / "results.json")["stage_seconds"]
    took, start = sum(seconds.values()), 5.0 if options.fresh else 0.5
    seconds = {"start": start, **seconds, "report": seconds.get("report", 0.2)}
    print(f"uninterrupted: {took:.1f} s")
    stops, failures, ends = [], compare(whole, expected), 0

    def summary() -> dict[str, Any]:
        made = [stop for stop in stops if stop.hit is not None]
        by = {
            name: dict(Counter(stop.hit for stop in made if stop.signal == name))
            for name in ("SIGKILL", "SIGINT", "SIGTERM")
        }
        return {
            "options": {
                "kills": options.kills,
                "signals": options.signals,
                "seed": options.seed,
                "fresh": options.fresh,
            },
            "uninterrupted_seconds": round(took, 1),
            "kills": sum(stop.signal == "SIGKILL" for stop in made),
            "signals_by_stage": by,
            "ends_compared": ends,
            "missed": len(stops) - len(made),
            "failures": failures,
            "stops": [asdict(stop) for stop in made],
            "environment": environment(),
        }

    with tqdm(total=options.kills + options.signals) as bar:
        while (
            hits := sum(stop.hit is not None for stop in stops)
        ) < options.kills + options.signals:
            left, number = options.kills - hits, len(stops)
            stages = ("start", *STAGES)
            if left > 0:
                chosen = sorted(
                    draw.choices(stages, weights=[1, 4, 3, 3, 4, 1, 1, 3], k=min(left, 13)),
                    key=stages.index,
                )
                now = [draw_stop(draw, stage) for stage in chosen]
            else:
                now = [
                    Stop(stage, draw.random(), None, 0.0, name)
                    for stage, name in zip(
                        ("teacher", "teacher", "statistics", "decompose", "distil", "distil"),
                        ("SIGINT", "SIGTERM") * 3,
                        strict=True,
                    )
                ][-(options.kills + options.signals - hits) :]
            job = Job(root / f"{number}")
            faults = chain(job, now, seconds, not options.fresh) + compare(job, expected)
            ends += 1
            failures += [f"{fault}, after {[asdict(stop) for stop in now]}" for fault in faults]
            if not faults:
                shutil.rmtree(job.folder)
            stops += now
            bar.update(sum(stop.hit is not None for stop in now))
            bar.set_postfix(ends=ends, failures=len(failures))
            for fault in faults:
                tqdm.write(f"{job.folder}: {fault} {now}")
            save_record(options.output, "kill", summary())
    return summary()


if __name__ == "__main__":
    main()
