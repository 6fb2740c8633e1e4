"""The real main job as a process of its own, small by its own options, and what must hold when it has ended."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bert_decomp.files import read_json
from bert_decomp.run import STAGES

# The embedded encoder and questions, with checkpoints in both trainings and in the statistics.
SMALL = {"task_name": "questions", "max_train_samples": 24, "max_eval_samples": 24, "teacher_num_train_epochs": 2,
         "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 3, "calibration_samples": 20,
         "calibration_batch_size": 1, "include": "*layer.[0-2].*", "measure_batch_sizes": 1, "measure_seconds": 0.05,
         "parameters": 0.4, "use_cpu": True, "disable_tqdm": True}


class Job:
    """``python -m bert_decomp.run`` into ``folder``/run with the teacher cache ``folder``/cache.

    Args:
        folder: of this job alone; both folders are made in it.
        options: of the command, instead of ``SMALL``.
    """

    def __init__(self, folder: Path, options: dict[str, Any] | None = None, **places: Path):
        self.folder = folder
        self.out, self.cache = places.get("out", folder / "run"), places.get("cache", folder / "cache")
        values = {**(SMALL if options is None else options), "output_dir": self.out, "cache_dir": self.cache}
        self.line = [part for name, value in values.items() for part in (f"--{name}", str(value))]

    def start(self, **environment: str) -> Attempt:
        """Start it in a process group of its own."""
        return Attempt(self.line, environment)

    def result(self) -> dict[str, Any]:
        """What may not differ between two ways to the same end: every file of both models, plan, spectra, metrics."""
        files = {str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
                 for part in ("decomposed", "model") for path in sorted((self.out / part).rglob("*")) if path.is_file()}
        return {"files": files, "metrics": read_json(self.out / "results.json")["metrics"],
                **{name: read_json(self.out / f"{name}.json") for name in ("plan", "spectra", "distillation_log")}}

    def leftovers(self) -> list[str]:
        """What an ended run may not leave behind: temporary names, checkpoints, a teacher's training folder."""
        return sorted(str(path.relative_to(root)) for root in (self.out, self.cache) if root.exists()
                      for path in root.rglob("*")
                      if re.search(r"\.partial(-|$)|^checkpoint|-training$|\.tmp$", path.name))


class Attempt:
    """One process of a job. Its output goes to files, so that it can be read while the process runs."""

    def __init__(self, line: list[str], environment: dict[str, str]):
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bert_decomp.run", *line], stdout=self._out, stderr=self._err,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment})

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
        return [line for line in self._read(self._err).replace("\r", "\n").splitlines() if line.strip()]

    def send(self, number: int) -> None:
        """A signal to the whole group, if any of it is left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, timeout: float = 600) -> int:
        """Its exit code; killed when the time is over.

        Raises:
            subprocess.TimeoutExpired: it did not end by itself.
        """
        try:
            return self.process.wait(timeout)
        finally:
            self.send(signal.SIGKILL)
