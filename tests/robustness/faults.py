"""Disk and memory: ``python -m tests.robustness.faults`` takes from the real main job what it needs, stage by stage.

The job works in one folder on a small tmpfs (so this needs root). At the beginning of a stage the disk fills up, turns
read-only, or the process may take no more memory; before everything its data file vanishes. Each time it must end with
code 2 and one line, and no earlier result may change. With the fault gone it continues to the next; at last it must end
as an undisturbed run does, although its data file vanishes once it has been read.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.records import save_record, suite_file
from bert_decomp.data.task import load_task
from bert_decomp.io.environment import environment
from bert_decomp.pipeline.run_folder import STAGES

from .job import SMALL, Attempt, Job
from .kill import compare


@dataclass
class Fault:
    """What befell the job as it began a ``stage``, the stage it was in when it ended, its exit code and last line."""

    kind: str
    stage: str
    ended_in: str = ""
    code: int = 0
    line: str = ""


class Disk:
    """A tmpfs that can be filled and made read-only."""

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")

    def _mount(self, *arguments: str) -> bool:
        return (
            subprocess.run(
                ["mount", *arguments, str(self.folder)], check=False, capture_output=True
            ).returncode
            == 0
        )

    def fill(self, _attempt: Attempt) -> None:
        about = os.statvfs(self.folder)
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, about.f_bavail - 1) * about.f_frsize)

    def forbid(self, attempt: Attempt) -> None:
        # Refused while a file is open for writing, so it is tried until none is.
        while not self._mount("-o", "remount,ro") and attempt.process.poll() is None:
            time.sleep(0.002)

    def repair(self) -> None:
        self._mount("-o", "remount,rw")
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=False)


def no_more_memory(attempt: Attempt) -> None:
    """What ``ulimit -v`` would set, at the size that the process has now."""
    pages = int(Path(f"/proc/{attempt.process.pid}/statm").read_text(encoding="ascii").split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(attempt.process.pid, resource.RLIMIT_AS, (size, size))


def results_in(folder: Path) -> dict[str, str]:
    """Digest by name of every finished file; ``run.json`` may gain a stage's time."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in ("run.json", "filler", "statistics.partial", "train.csv")
        and not any(
            part.startswith((".partial-", "checkpoint")) or part.endswith("-training")
            for part in path.parts
        )
    }


def strike(job: Job, fault: Fault, do: Callable[[Attempt], None], warm: bool = True) -> list[str]:
    """One attempt that meets ``fault`` at the beginning of its stage; what went wrong beyond the fault."""
    before, order = results_in(job.folder), ("start", *STAGES)
    attempt = job.start(warm=warm)
    while attempt.process.poll() is None and order.index(attempt.stage) < order.index(fault.stage):
        time.sleep(0.001)
    if attempt.process.poll() is None:
        do(attempt)
    try:
        fault.code = attempt.wait(300)
    except subprocess.TimeoutExpired:
        attempt.process.wait(10)
        fault.code = 124
    fault.ended_in = attempt.stage
    said = [line for line in attempt.errors if line.startswith("error: ")]
    # Places of the machine do not belong into a result file.
    fault.line = (
        said[-1].replace(str(job.folder), "FOLDER") if said else " | ".join(attempt.errors[-2:])
    )
    problems = []
    # Code 0: it had all the memory that it needed.
    if (fault.kind, fault.code) == ("no more memory", 0):
        fault.line = ""
    elif fault.code != 2 or len(said) != 1 or any("Traceback" in line for line in attempt.errors):
        problems.append(f"code {fault.code}, said {attempt.errors[-4:]}")
    after = results_in(job.folder)
    return problems + [
        f"{name} changed" for name, digest in before.items() if after.get(name) != digest
    ]


def write_data(path: Path) -> None:
    """The beginning of the embedded questions as a file of a user's own."""
    task = load_task("questions")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                ("sentence", "label"),
                *(
                    (row["text"], task.label_names[row["label"]])
                    for row in task.train.select(range(64))
                ),
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fresh", action="store_true", help="an interpreter of its own for every process"
    )
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: mounting a tmpfs needs root")
    root = Path(tempfile.mkdtemp())
    disk = Disk(root / "disk", 2000)
    try:
        found = soak(root, disk, warm=not options.fresh)
        save_record(
            options.output,
            "faults",
            {"options": {"fresh": options.fresh}, **found, "environment": environment()},
        )
    finally:
        disk.repair()
        disk.close()
        shutil.rmtree(root, ignore_errors=True)
    raise SystemExit(bool(found["failures"]))


def soak(root: Path, disk: Disk, warm: bool) -> dict[str, Any]:
    """Reference, faults, and the end."""
    data = disk.folder / "train.csv"
    write_data(data)
    own = {name: value for name, value in SMALL.items() if name != "task_name"}
    options = {**own, "train_file": data}
    whole, job = Job(root / "whole", options), Job(disk.folder, options)
    attempt = whole.start(warm=warm)
    if attempt.wait(1200) != 0:
        raise SystemExit(f"the undisturbed run failed: {attempt.errors[-3:]}")
    expected, failures, faults = whole.result(), [], []
    kinds = {
        "data file gone": lambda _: data.unlink(),
        "disk read-only": disk.forbid,
        "disk full": disk.fill,
        "no more memory": no_more_memory,
    }
    plan = [
        ("data file gone", "start"),
        ("disk read-only", "start"),
        *(
            (kind, stage)
            for stage in ("teacher", "statistics", "decompose", "distil", "report")
            for kind in ("disk read-only", "disk full", "no more memory")
            if (kind, stage) != ("no more memory", "report")
        ),
    ]
    for kind, stage in tqdm(plan, unit="fault"):
        fault = Fault(kind, stage)
        if stage == "start":  # before it starts, so that nothing is too late
            kinds[kind](attempt)
        problems = strike(job, fault, kinds[kind] if stage != "start" else lambda _: None, warm)
        disk.repair()
        if not data.exists():
            write_data(data)
        tqdm.write(f"{kind} at {stage}: ended in {fault.ended_in} with {fault.code}: {fault.line}")
        failures += [f"{kind} at {stage}: {problem}" for problem in problems]
        faults.append(fault)
    last = job.start(warm=warm)
    while last.process.poll() is None and last.stage in ("start", "teacher"):
        time.sleep(0.01)
    data.unlink()
    if last.wait(1200) != 0:
        failures.append(f"the last start failed: {last.errors[-2:]}")
    failures += compare(job, expected)
    return {"faults": len(faults), "failures": failures, "met": [asdict(fault) for fault in faults]}


if __name__ == "__main__":
    main()
