"""A command in a forked process of its own: how it ends, what it says, how much it grows, and which files change."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars

from bert_decomp.cli.command import command

Main = Callable[[list[str]], None]
# How much longer than its limit a process is waited for: the machine may be busy, and what hangs is not in a hurry.
PATIENCE = 20


@dataclass
class Outcome:
    """How one case ended.

    Its exit code (negative for a signal, None when stopped for time), lines on standard error, seconds
    (of the processor's time, or waited for without end: a busy machine must not fail a case), and how many bytes it
    grew."""

    code: int | None
    errors: list[str]
    seconds: float
    grown: int


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def execute(main: Main, argv: list[str], folder: Path, limit: float = 30.0) -> Outcome:
    """Call a command in a forked process, in ``folder``; a process that takes longer is killed."""
    logs = [folder / name for name in (".stdout", ".stderr", ".memory")]
    sys.stdout.flush()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(main, argv, folder, logs)
    while (ended := os.wait4(child, os.WNOHANG))[
        0
    ] == 0 and time.monotonic() - start < PATIENCE * limit:
        time.sleep(0.005)
    late = ended[0] == 0
    if late:
        os.kill(child, signal.SIGKILL)
        ended = os.wait4(child, 0)
    _, status, used = ended
    seconds = time.monotonic() - start if late else used.ru_utime + used.ru_stime
    errors = [
        line
        for line in logs[1].read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    grown = int(logs[2].read_text() or 0) if logs[2].exists() else 0
    for log in logs:
        log.unlink(missing_ok=True)
    return Outcome(None if late else os.waitstatus_to_exitcode(status), errors, seconds, grown)


def _child(main: Main, argv: list[str], folder: Path, logs: list[Path]) -> None:
    code = 3
    try:
        for number, log in enumerate(logs[:2], 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # Whoever called may have put something else in the place of these.
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        os.chdir(folder)
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        # Far above what any case may take; it keeps one that fails from taking the machine with it.
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 6 * 2**30,) * 2)
        disable_progress_bars()
        try:
            code = command(main, argv)
        except SystemExit as error:
            code = error.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        logs[2].write_text(str(_memory("VmHWM") - before))
    finally:
        os._exit(code)


def tree(root: Path, leave: Path) -> dict[str, tuple]:
    """Every file below ``root`` but not below ``leave``, with what would change if it were written to."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != leave]
        for name in files:
            about = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found
