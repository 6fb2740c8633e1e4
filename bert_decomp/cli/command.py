"""The frame of every command: one clear line and exit code 2 for what the user can mend, never a traceback for it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

from safetensors import SafetensorError
from tqdm import tqdm

from lowrank_kernels.tuning import TableError

from ..errors import UserError

LONGEST_MESSAGE = 600
# By these words torch, safetensors and the interpreter say, as errors of no special type, what the machine lacks.
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


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run ``main`` with the command line's arguments and return the exit code: 0, or 2 after one line on stderr."""
    # Tokenizers warn at every fork of a data loader unless this is decided.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A progress bar's watching thread that finds no memory to start with would be waited for without end.
    tqdm.monitor_interval = 0
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("bert_decomp").setLevel(logging.INFO)
    # SIGINT too: a shell that starts a job in the background makes it ignore SIGINT, and Python then leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    arguments = sys.argv[1:] if argv is None else argv
    again = "the same command goes on from here"
    if any(argument.startswith("--overwrite_output_dir") for argument in arguments):
        again += " (without --overwrite_output_dir, which would discard it)"
    try:
        main(arguments)
    except (UserError, TableError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain(f"interrupted; nothing is half-written, and {again}")
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        message = _mendable(error)
        if message is None:
            raise
        return _complain(f"{message}, and {again}")
    return 0


def _mendable(error: Exception) -> str | None:
    """What failed and what to do, if the machine failed the program; None for what is a defect and is shown whole."""
    said = (str(error).splitlines() or [""])[0]
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(sign in said for sign in OUT_OF_MEMORY)
    ):
        return "the memory is not enough; give more of it, or smaller batches"
    if isinstance(error, OSError):
        return (
            f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}; mend it"
        )
    # torch and safetensors report a failed write in their own types.
    return (
        f"cannot write: {said}; free space"
        if any(sign in str(error) for sign in FAILED_WRITE)
        else None
    )


def _complain(message: str) -> int:
    # Messages quote names out of files: what a terminal would obey is escaped, and a name of megabytes is cut.
    line = " ".join(message[: 4 * LONGEST_MESSAGE].split())
    line = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line
    )
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return 2
