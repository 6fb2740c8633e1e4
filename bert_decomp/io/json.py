"""Reading and writing JSON and text: regular files of bounded size only, and one clear error for everything else."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import write_text

# Bytes of the longest JSON file that is read: parsing takes about twenty times the text.
JSON_LIMIT = 16 * 2**20


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_file(path: str | Path, limit: int | None = None) -> Path:
    """Raise UserError unless ``path`` is, or links to, a regular file of at most ``limit`` bytes; return it as a Path.

    A device or a pipe would be read forever.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is not a regular file")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path} has {status.st_size} bytes; such a file has at most {limit}")
    return path


def read_text(path: str | Path, limit: int = JSON_LIMIT) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file is absent, unreadable, longer than ``limit`` bytes or not UTF-8.
    """
    path = check_file(path, limit)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it again"
        ) from error


def parse_json(text: str, source: str | Path) -> Any:
    """JSON text as plain values; a key that occurs twice in one object is refused: readers differ on which one counts.

    Raises:
        UserError: the text is not JSON; the message names ``source``.
    """
    # Imported here because the package imports torch, and --help reads no file.
    from lowrank_kernels.strict_json import unique_keys

    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source} is not a JSON file ({error}); fix it or name another file"
        ) from error


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is absent, unreadable, longer than ``limit`` bytes or not JSON.
    """
    return parse_json(read_text(path, limit), path)
