"""Writing results so that no partial file is ever taken for a whole one.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed into place, so a
reader sees the old file, the new one, or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

# One marker for every temporary name, so that leftovers of a killed run can be recognised and removed.
TEMPORARY_MARK = ".partial-"
# Bytes of the longest JSON file that is read: parsing takes some twenty times the text, and no honest one comes near.
JSON_LIMIT = 16 * 2**20


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_MARK}{path.name}-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces ``path``, on any failure it is removed.

    Raises:
        UserError: the folder cannot be made, written to, or is full.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder") from error
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it replaces the folder ``path``, on any failure it is removed.

    Raises:
        UserError: the folder cannot be made, written to, or is full.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        if path.exists():
            # A folder cannot be renamed over a full one: move the old one aside first, then drop it.
            old = _temporary_name(path)
            os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder") from error
    finally:
        _remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_file(path: str | Path, limit: int | None = None) -> Path:
    """Raise UserError unless ``path`` is, or links to, a regular file of at most ``limit`` bytes; return it as a Path.

    A device or a pipe would be read for ever.
    """
    path = Path(path)
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"cannot read {path}: it is no regular file")
    if limit is not None and about.st_size > limit:
        raise UserError(f"{path} has {about.st_size} bytes; such a file has at most {limit}")
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
        raise UserError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); write it anew") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice!r} stands twice")
    return value


def parse_json(text: str, source: str | Path) -> Any:
    """JSON text as plain values; a key that stands twice in one object is refused, as each reader would take another.

    Raises:
        UserError: ``source`` is named as no JSON file.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a JSON file ({error}); write it anew or name another file") from error


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is absent, unreadable, longer than ``limit`` bytes or not JSON.
    """
    return parse_json(read_text(path, limit), path)


def remove_leftovers(folder: str | Path) -> None:
    """Delete what a killed run left half-written directly in ``folder``."""
    for path in Path(folder).glob(f"{TEMPORARY_MARK}*"):
        _remove(path)
