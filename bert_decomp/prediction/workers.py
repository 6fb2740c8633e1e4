"""Windows of texts answered by this process or by several, each with a model of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..data.windows import Window
from ..errors import UserError
from ..models.folders import is_int8
from .predictor import Predictor, Report
from .shards import Shards

if TYPE_CHECKING:
    import pyarrow as pa


def keep_no_kernels() -> None:
    """Let oneDNN keep none, in a process that has not computed yet. Sorted texts make batches of ever new shapes, and
    the kernels that it would keep for them are half a gigabyte."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")


def prepare_process() -> None:
    """Settings of a process that answers windows and does nothing else, before it loads the model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_no_kernels()


@dataclass(frozen=True)
class Work:
    """What every process does: ``predictor`` are the arguments of ``Predictor``."""

    shards: Shards
    threads: int
    predictor: dict[str, Any] = field(default_factory=dict)

    def start(self, device: str | None = None) -> Predictor:
        """Load the model."""
        import torch

        torch.set_num_threads(self.threads)
        return Predictor(**self.predictor, device=device)

    def on_gpu(self) -> bool:
        """Whether the model runs on a GPU where there is one."""
        return self.predictor["calibration"] is None and not is_int8(self.predictor["folder"])

    def table(self, predictor: Predictor, window: Window, report: Report) -> pa.Table:
        """The rows of a window's shard."""
        import pyarrow as pa

        first, second = [*window.texts, None][:2]
        assert first is not None
        columns = predictor.columns(first, second, report)
        kept = dict(zip(window.kept.column_names, window.kept.columns, strict=True))
        return pa.table({**kept, **columns})

    def answer(self, predictor: Predictor, window: Window, report: Report) -> None:
        """Answer one window and write its shard."""
        table = self.table(predictor, window, report)
        parent = multiprocessing.parent_process()
        if parent is None or parent.is_alive():
            self.shards.write(window.number, table)


def answer_locally(
    work: Work, windows: Iterator[Window], report: Report, processes: int, address: None = None
) -> None:
    """Answer the windows on this machine, in this process or in several."""
    if processes == 1:
        answer_here(work, windows, report)
    else:
        answer_in_processes(work, windows, processes, report)


def answer_here(work: Work, windows: Iterator[Window], report: Report) -> None:
    """Answer the windows in this process."""
    window = next(windows, None)
    if window is None:
        return
    predictor = work.start()
    report(0, 0)
    while window is not None:
        work.answer(predictor, window, report)
        window = next(windows, None)


def _pack(window: Window) -> bytes:
    """A window as an Arrow stream."""
    import pyarrow as pa

    texts = {f"text.{place}": pa.array(column) for place, column in enumerate(window.texts)}
    kept = {
        f"kept.{name}": column
        for name, column in zip(window.kept.column_names, window.kept.columns, strict=True)
    }
    table = pa.table({**texts, **kept}).replace_schema_metadata({"number": str(window.number)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> Window:
    import pyarrow as pa

    table: pa.Table = pa.ipc.open_stream(data).read_all()
    texts = [name for name in table.column_names if name.startswith("text.")]
    kept = table.drop_columns(texts)
    return Window(
        int(table.schema.metadata[b"number"]),
        [table[name].to_pylist() for name in texts],
        kept.rename_columns([name.removeprefix("kept.") for name in kept.column_names]),
    )


def _worker(connection: Connection, work: Work, index: int) -> None:
    """What a process does: answer what comes, until nothing more can."""
    import torch

    # The first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prepare_process()
    # A bar's own lock is a semaphore of the system, of which Python complains when this process is ended.
    tqdm.set_lock(threading.RLock())

    def say(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    try:
        gpus = torch.cuda.device_count() if work.on_gpu() else 0
        predictor = work.start(f"cuda:{index % gpus}" if gpus else None)
        while True:
            say(idle=True)
            window = _unpack(connection.recv_bytes())
            work.answer(predictor, window, lambda rows, tokens: say(rows=rows, tokens=tokens))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        say(error=str(error))
    except Exception:
        say(defect=traceback.format_exc())


def answer_in_processes(
    work: Work, windows: Iterator[Window], processes: int, report: Report
) -> None:
    """Answer the windows in ``processes`` processes; each asks for the next one when it has nothing to do.

    Raises:
        UserError: a process reports one, or dies.
    """
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, Any] = {}
    try:
        for index in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, work, index), daemon=True)
            process.start()
            theirs.close()
            team[ours] = process
        while team:
            for ready in wait(list(team)):
                assert isinstance(ready, Connection)
                _attend(ready, team, windows, report)
    finally:
        for connection, process in team.items():
            process.terminate()
            process.join()
            connection.close()


def _attend(
    connection: Connection, team: dict[Connection, Any], windows: Iterator[Window], report: Report
) -> None:
    """React to what one process says."""
    try:
        message = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        team[connection].join()
        code = team[connection].exitcode
        raise UserError(
            f"a process ended with code {code}, perhaps for lack of memory; run the same command again, with fewer "
            "processes or fewer batch_tokens"
        ) from None
    if "error" in message:
        raise UserError(message["error"])
    if "defect" in message:
        raise RuntimeError(f"in a process:\n{message['defect']}")
    if "rows" in message:
        report(message["rows"], message["tokens"])
        return
    report(0, 0)
    window = next(windows, None)
    if window is not None:
        connection.send_bytes(_pack(window))
        return
    process = team.pop(connection)
    connection.close()
    process.join()
