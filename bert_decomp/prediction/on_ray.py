"""Windows of texts answered by actors of a Ray cluster, each with a model of its own.

Ray only executes the windows: this process reads them and writes the shards. So the machines of a cluster share nothing
but the model's folder, and an actor that Ray starts again cannot write a shard twice. Ray Data would bring nothing: it
reads files in blocks of its own, and here windows are made in order, and the shards know what is left to do.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.demo import resolve_model
from ..data.windows import Window
from ..errors import UserError
from ..models.folders import fingerprint_of_checkpoint
from .predictor import Predictor, Report
from .workers import Work, prepare_process

if TYPE_CHECKING:
    import pyarrow as pa

# Seconds in which a cluster's address must answer: Ray itself tries for minutes.
PATIENCE = 10
# How often an actor that is lost with its machine, or killed for memory, is started again.
RESTARTS = 3


class Worker:
    """What an actor runs. What the user can fix comes back as text: Ray would wrap an exception in its traceback."""

    def __init__(self) -> None:
        self.predictor: Predictor | None = None

    def load(self, work: Work) -> str | None:
        """Load the model; an error's message, or None."""
        prepare_process()
        folder = work.predictor["folder"]
        try:
            if fingerprint_of_checkpoint(folder) != work.shards.settings["model"]:
                raise UserError(
                    f"{folder} is absent or another model; every machine needs the same folder under that path"
                )
            self.predictor = work.start()
        except UserError as error:
            return f"on {socket.gethostname()}: {error}"
        return None

    def answer(self, work: Work, window: Window) -> tuple[pa.Table, int] | str:
        """The rows of a window's shard and the tokens of its texts, or an error's message."""
        if self.predictor is None:
            # Ray started this actor again, perhaps on another machine.
            error = self.load(work)
            if error is not None:
                return error
        assert self.predictor is not None
        counts: list[int] = []
        try:
            table = work.table(self.predictor, window, lambda _, tokens: counts.append(tokens))
        except UserError as error:
            return f"on {socket.gethostname()}: {error}"
        return table, sum(counts)


def units_each(units: list[float], processes: int) -> int:
    """The most that each of ``processes`` can have of machines with so many ``units``; 0 if not all find a place.

    >>> units_each([8, 4], 3), units_each([8, 4], 4), units_each([1], 2)
    (4, 2, 0)
    """
    most = int(max(units, default=0))
    fits = (each for each in range(most, 0, -1) if sum(x // each for x in units) >= processes)
    return next(fits, 0)


def gpu_each(gpus: float, processes: int) -> float:
    """The share of a GPU of each process: a whole one at most, 0 if there is none; in Ray's steps of 0.0001.

    >>> gpu_each(4, 2), gpu_each(2, 3), gpu_each(1, 6), gpu_each(0, 2)
    (1.0, 0.5, 0.1666, 0.0)
    """
    if gpus < 1:
        return 0.0
    return math.floor(10000 / math.ceil(processes / gpus)) / 10000


def answer_on_ray(
    work: Work,
    windows: Iterator[Window],
    report: Report,
    processes: int,
    address: str | None = None,
) -> None:
    """Answer the windows in ``processes`` actors.

    Args:
        address: HOST:PORT of a cluster, or "auto" for that of this machine; None for the one that this process is
            connected to, else that of ``RAY_ADDRESS``, else one on this machine for this job alone.

    Raises:
        UserError: no cluster answers, it is too small, or an actor reports an error or is lost.
    """
    window = next(windows, None)
    if window is None:
        return
    import ray

    folder = resolve_model(work.predictor["folder"])
    if Path(folder).is_dir():
        work = replace(work, predictor={**work.predictor, "folder": str(Path(folder).absolute())})
    with _cluster(address, work.threads * processes):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [node.get("CPU", 0.0) for node in nodes]
        threads = units_each(cpus, processes)
        if threads == 0:
            raise UserError(
                f"processes {processes} is more than the CPUs of the Ray cluster, {sum(cpus):g}"
            )
        gpus = sum(node.get("GPU", 0.0) for node in nodes) if work.on_gpu() else 0.0
        actor = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=gpu_each(gpus, processes),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        work = replace(work, threads=threads)
        team: list[Any] = [actor.remote() for _ in range(processes)]
        try:
            _answer(team, work, itertools.chain([window], windows), report)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"Ray lost an actor ({_line(error)}), perhaps for lack of memory; run the same command again, with "
                "fewer processes or fewer batch_tokens"
            ) from error
        finally:
            for one in team:
                ray.kill(one)


def _answer(team: list[Any], work: Work, windows: Iterator[Window], report: Report) -> None:
    """Give every actor one window after the other; one that finds no place yet holds up nothing."""
    import ray

    shared = ray.put(work)
    pending: dict[Any, tuple[Any, Window | None]] = {
        actor.load.remote(shared): (actor, None) for actor in team
    }
    window = next(windows, None)
    while window is not None or any(given is not None for _, given in pending.values()):
        ready = ray.wait(list(pending))[0][0]
        actor, given = pending.pop(ready)
        result = ray.get(ready)
        if isinstance(result, str):
            raise UserError(result)
        if given is None:
            report(0, 0)
        else:
            table, tokens = result
            work.shards.write(given.number, table)
            report(len(given), tokens)
        if window is not None:
            pending[actor.answer.remote(shared, window)] = actor, window
            window = next(windows, None)


@contextlib.contextmanager
def _cluster(address: str | None, cpus: int) -> Iterator[None]:
    """A connection to the cluster of ``answer_on_ray``; one that is started here has ``cpus``."""
    import ray

    if address is None and ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start: dict[str, Any] = (
        {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    )
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **start)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot use the Ray cluster {address!r}: {_line(error)}") from error
    finally:
        if main:
            # Ray puts its own in place, which would end the job without a word.
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Raise UserError unless somebody listens there."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"ray_address is {address!r}; give HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
