"""The frame of every command: one clear line and exit code 2 for what the user can mend, never a traceback for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from .errors import UserError

LONGEST_MESSAGE = 600


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run ``main`` with the command line's arguments and return the exit code: 0, or 2 after one line on stderr."""
    # Tokenizers warn at every fork of a data loader unless this is decided.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("bert_decomp").setLevel(logging.INFO)
    # SIGINT too: a shell that starts a job in the background makes it ignore SIGINT, and Python then leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted; nothing is half-written, and the same command goes on from here")
    except OSError as error:
        return _complain(f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}; "
                         "mend it, and the same command goes on from here")
    except (SafetensorError, RuntimeError) as error:
        # torch and safetensors report a failed write in their own types; everything else is a defect and is shown whole.
        if not any(sign in str(error) for sign in ("PytorchStreamWriter", "file write failed", "No space left",
                                                   "I/O error")):
            raise
        return _complain(f"cannot write: {str(error).splitlines()[0]}; free space, and the same command goes on from here")
    return 0


def _complain(message: str) -> int:
    # Messages quote names out of files: what a terminal would obey is escaped, and a name of megabytes is cut.
    line = " ".join(message[:4 * LONGEST_MESSAGE].split())
    line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2:]}"
    print(f"error: {line}", file=sys.stderr)
    return 2
