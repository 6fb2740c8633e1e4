"""The real main job as a process of its own, small by its own options, and what must hold when it has ended."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.io.json import read_json
from bert_decomp.pipeline.run_folder import STAGES

# The embedded encoder and questions, with checkpoints in both trainings and in the statistics.
SMALL = {
    "task_name": "questions",
    "max_train_samples": 16,
    "max_eval_samples": 24,
    "teacher_num_train_epochs": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "calibration_samples": 20,
    "calibration_batch_size": 1,
    "include": "*layer.[01].*",
    "measure_batch_sizes": 1,
    "measure_seconds": 0.05,
    "encoder_fraction": 0.4,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


class Job:
    """``python -m bert_decomp.run`` into ``folder``/run with the teacher cache ``folder``/cache.

    Args:
        folder: of this job alone; both folders are made in it.
        options: of the command, instead of ``SMALL``.
    """

    def __init__(self, folder: Path, options: dict[str, Any] | None = None, **places: Path):
        self.folder = folder
        self.out, self.cache = (
            places.get("out", folder / "run"),
            places.get("cache", folder / "cache"),
        )
        values = {
            **(SMALL if options is None else options),
            "output_dir": self.out,
            "cache_dir": self.cache,
        }
        self.line = [part for name, value in values.items() for part in (f"--{name}", str(value))]

    def start(self, warm: bool = False) -> Attempt:
        """Start it in a process group of its own; ``warm``: forked from one that has imported everything already."""
        return Attempt(self.line, warm)

    def result(self) -> dict[str, Any]:
        """What may not differ between two ways to the same end: every file of both models but the card, which has
        times; plan, spectra, metrics, and each logged loss."""
        files = {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for part in ("decomposed", "model")
            for path in sorted((self.out / part).rglob("*"))
            if path.is_file() and path.name != "README.md"
        }
        log = [entry for entry in read_json(self.out / "distillation_log.json") if "loss" in entry]
        return {
            "files": files,
            "metrics": read_json(self.out / "results.json")["metrics"],
            "losses": log,
            **{name: read_json(self.out / f"{name}.json") for name in ("plan", "spectra")},
        }

    def leftovers(self) -> list[str]:
        """What an ended run may not leave behind: temporary names, checkpoints, a teacher's training folder."""
        return sorted(
            str(path.relative_to(root))
            for root in (self.out, self.cache)
            if root.exists()
            for path in root.rglob("*")
            if re.search(r"\.partial(-|$)|^checkpoint|-training$|\.tmp", path.name)
        )


def _forked(line: list[str], out: str, err: str, variables: dict[str, str]) -> None:
    """What ``python -m bert_decomp.run`` does, in a forked process."""
    os.setsid()
    # The variable too: without it accelerate gives each of several processes a share of the cores.
    os.environ.update(variables, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    code = command(main, line)
    sys.stdout.flush()
    os._exit(code)


class Forked:
    """The main job from multiprocessing's fork server, on one thread, with ``subprocess.Popen``'s ways.

    Args:
        out, err: named files for its output.
        variables: further ones of its environment.
    """

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [
            "bert_decomp.pipeline.run",
            "transformers.models.bert.modeling_bert",
            "tests.robustness.job",
        ]
    )

    def __init__(
        self, line: list[str], out: Any, err: Any, variables: dict[str, str] | None = None
    ):
        self._process = self.server.Process(
            target=_forked, args=(line, out.name, err.name, variables or {})
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the forked job", timeout)
        return self._process.exitcode


class Attempt:
    """One process of a job. Its output goes to files, so that it can be read while the process runs."""

    def __init__(self, line: list[str], warm: bool):
        self._out, self._err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.began = time.perf_counter()
        self.process = (
            Forked(line, self._out, self._err)
            if warm
            else subprocess.Popen(
                [sys.executable, "-m", "bert_decomp.run", *line],
                stdout=self._out,
                stderr=self._err,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        )

    @staticmethod
    def _read(file: Any) -> str:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    @property
    def stage(self) -> str:
        """The stage that it announced last; "start" before the first."""
        found = re.findall(rf"^\[\d/{len(STAGES)}\] (\w+)", self._read(self._out), re.MULTILINE)
        return found[-1] if found else "start"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def errors(self) -> list[str]:
        """Its lines on standard error, progress bars apart."""
        return [
            line for line in self._read(self._err).replace("\r", "\n").splitlines() if line.strip()
        ]

    def send(self, number: int) -> None:
        """A signal to the whole group, if any of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 600) -> int:
        """Its exit code; killed when the time is over.

        Raises:
            subprocess.TimeoutExpired: it did not end by itself.
        """
        try:
            return self.process.wait(timeout)
        finally:
            self.send(signal.SIGKILL)
