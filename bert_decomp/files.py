"""Writing results so that no partial file is ever taken for a whole one.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed into place, so a
reader sees the old file, the new one, or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

# One marker for every temporary name, so that leftovers of a killed run can be recognised and removed.
TEMPORARY_MARK = ".partial-"


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


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is absent, unreadable or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); write it anew or name another file") from error


def remove_leftovers(folder: str | Path) -> None:
    """Delete what a killed run left half-written directly in ``folder``."""
    for path in Path(folder).glob(f"{TEMPORARY_MARK}*"):
        _remove(path)
