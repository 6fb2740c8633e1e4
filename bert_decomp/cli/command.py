"""The frame of every command: a clear line and exit code 2 for what the user can fix, a traceback for defects alone."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable

from ..errors import UserError
from ..extras import install_hint

LONGEST_MESSAGE = 600
# What a shell gives for a program that SIGPIPE ended.
READER_GONE = 128 + 13
# By these words torch, safetensors and the interpreter report, in errors of no special type, what the machine lacks.
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",
)
FAILED_WRITE = ("PytorchStreamWriter", "file write failed", "No space left", "I/O error")


class LineHandler(logging.StreamHandler):
    """Writes to standard error what is logged, on lines of their own above a progress bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        # Who draws a bar has imported it.
        module = sys.modules.get("tqdm")
        if module is None or not hasattr(module, "tqdm"):
            super().emit(record)
            return
        with module.tqdm.external_write_mode(self.stream):
            super().emit(record)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run ``main`` with the command line's arguments and return the exit code.

    It is 0, 2 after one line on stderr, or ``READER_GONE`` where nobody reads the output any more, as in ``| head``.
    """
    # Tokenizers warn at every fork of a data loader unless this is decided.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", handlers=[LineHandler()])
    logging.getLogger("bert_decomp").setLevel(logging.INFO)
    # SIGINT too: a shell that starts a job in the background makes it ignore SIGINT, and Python then leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    arguments = sys.argv[1:] if argv is None else argv
    resume = "the same command continues from here"
    if any(argument.startswith("--overwrite_output_dir") for argument in arguments):
        resume += " (without --overwrite_output_dir, which would discard it)"
    try:
        _stop_bar_monitor()
        try:
            main(arguments)
        finally:
            _flush()
    except KeyboardInterrupt:
        return _fail(f"interrupted; nothing is half-written, and {resume}")
    except Exception as error:
        unread = isinstance(error, BrokenPipeError) and _reader_gone()
        _discard_output()
        if unread:
            return READER_GONE
        message = _explain(error, resume)
        if message is None:
            raise
        return _fail(message)
    return 0


def _flush() -> None:
    """Write out what was printed: in the interpreter's last moments a failure would go past ``command``."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _discard_output() -> None:
    """Drop what was printed if it cannot be written, so that the interpreter does not try again."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads.

    The signal is left ignored: it would also end a job because of a worker or a client of the server.
    """
    poll = select.poll()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice: each stage has a bar of its own."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def _stop_bar_monitor() -> None:
    """Draw bars without tqdm's watching thread: one that finds no memory to start with would be waited for forever."""
    try:
        from tqdm import tqdm
    except ImportError:
        return
    tqdm.monitor_interval = 0


def _explain(error: Exception, resume: str) -> str | None:
    """The message for what the user or the machine did wrong; None for a defect, which is shown with its traceback."""
    if isinstance(error, UserError) or _is_table_error(error):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return install_hint(error.name or "")
    message = _machine_failure(error)
    return message and f"{message}, and {resume}"


def _is_table_error(error: Exception) -> bool:
    if not isinstance(error, ValueError):
        return False
    from lowrank_kernels.tuning import TableError

    return isinstance(error, TableError)


def _machine_failure(error: Exception) -> str | None:
    """What the machine failed at and what to do, or None."""
    from safetensors import SafetensorError

    if not isinstance(error, (OSError, SafetensorError, RuntimeError, MemoryError)):
        return None
    first_line = (str(error).splitlines() or [""])[0]
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in first_line for words in OUT_OF_MEMORY)
    ):
        return "the memory is not enough; give more of it, or smaller batches"
    if isinstance(error, OSError):
        return (
            f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}; fix it"
        )
    # torch and safetensors report a failed write in their own types.
    if any(words in str(error) for words in FAILED_WRITE):
        return f"cannot write: {first_line}; free space"
    return None


def _fail(message: str) -> int:
    # Messages quote names out of files: control characters are escaped, and a name of megabytes is cut.
    line = " ".join(message[: 4 * LONGEST_MESSAGE].split())
    line = "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in line
    )
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return 2
