"""One run's output folder: whose results it holds, how long each stage took, and a lock against a second run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import RENAMED
from ..errors import UserError
from ..io.atomic import exclusive_lock, remove, remove_leftovers
from ..io.json import read_json, write_json

if sys.platform != "win32":
    import resource

STAGES = ("teacher", "statistics", "decompose", "distil", "evaluate", "measure", "report")
RUN_FILE = "run.json"
# Content of RUN_FILE while an older run is being deleted.
DISCARDED = {"discarded": True}


def peak_memory_mb() -> float:
    """Most memory this process has had resident so far, in MB of 10**6 bytes; NaN where the system does not tell."""
    if sys.platform == "win32":
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def release_memory() -> None:
    """Give freed memory back to the system. The C library keeps it otherwise, in pieces that the next stage, with
    tensors of other sizes, may not fit into."""
    gc.collect()
    if sys.platform == "linux":
        # Other C libraries than glibc have no such call.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class RunFolder:
    """A folder that belongs to one set of options. ``open`` claims it for the first process; the others only read it.

    Args:
        path: the folder, which need not exist.
        is_main: whether this is the first process, the only one that writes.
    """

    def __init__(self, path: str | Path, is_main: bool = True):
        self.path, self.is_main = Path(path), is_main
        self._identity: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._lock = contextlib.ExitStack()

    def open(self, identity: dict[str, Any], overwrite: bool = False) -> None:
        """Lock the folder and write down what it holds.

        Args:
            identity: the options that decide the results.
            overwrite: discard a run with other options.

        Raises:
            UserError: the folder holds something else, or another run is at work in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another output_dir")
        with contextlib.ExitStack() as lock:
            lock.enter_context(exclusive_lock(self.path))
            self._claim(identity, overwrite)
            self._lock = lock.pop_all()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _claim(self, identity: dict[str, Any], overwrite: bool) -> None:
        file = self.path / RUN_FILE
        # A run killed in its first moment leaves no more than this.
        remove_leftovers(self.path, RUN_FILE)
        if not file.is_file() and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} holds files of something else than a run; choose another output_dir"
            )
        before = read_json(file) if file.is_file() else None
        if before is not None and (overwrite or before == DISCARDED):
            # The folder is marked first: what a kill leaves of the old run is never taken for results.
            write_json(file, DISCARDED)
            for path in self.path.iterdir():
                if path.name != RUN_FILE:
                    remove(path)
        elif before is not None:
            before = before if isinstance(before, dict) else {}
            self._check_identity(identity, _table(before.get("options")))
            self._seconds = _numbers(before.get("stage_seconds"))
            self._peaks = _numbers(before.get("stage_peak_memory_mb"))
        self._identity = identity
        self._write()
        remove_leftovers(self.path)

    def _check_identity(self, identity: dict[str, Any], known: dict[str, Any]) -> None:
        # A run of version 0.1 continues: its options had other names.
        known = {RENAMED.get(name, name): value for name, value in known.items()}
        for name in sorted({*identity, *known}):
            if identity.get(name) != known.get(name):
                raise UserError(
                    f"{self.path} holds another run ({name} was {known.get(name)!r}, is {identity.get(name)!r}); "
                    "choose another output_dir, or discard it with overwrite_output_dir"
                )

    def _write(self) -> None:
        write_json(
            self.path / RUN_FILE,
            {
                "options": self._identity,
                "stage_seconds": self._seconds,
                "stage_peak_memory_mb": self._peaks,
            },
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds that each finished stage took when it ran."""
        return {name: self._seconds[name] for name in STAGES if name in self._seconds}

    @property
    def peaks(self) -> dict[str, float]:
        """The process's peak resident memory, in MB, from its start to the end of each finished stage when it ran."""
        return {name: self._peaks[name] for name in STAGES if name in self._peaks}

    @contextlib.contextmanager
    def stage(self, name: str, result: Path | None = None) -> Iterator[None]:
        """Announce and time a stage; one whose ``result`` exists already keeps the time it took then."""
        done = result is not None and result.exists()
        if self.is_main:
            print(
                f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}{': done before' if done else ''}",
                flush=True,
            )
        start = time.perf_counter()
        yield
        release_memory()
        if self.is_main and (not done or name not in self._seconds):
            self._seconds[name] = time.perf_counter() - start
            self._peaks[name] = peak_memory_mb()
            self._write()


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    return {
        name: float(number)
        for name, number in _table(value).items()
        if isinstance(number, (int, float))
    }
