"""Atomic writes and a lock: a reader sees the old file, the new one, or none, never a partial one.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed into place.
Checkpoints, which a library fills in its own way, get a manifest instead (``manifest``).
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

if sys.platform != "win32":
    import fcntl

# One marker for every temporary name, so that leftovers of a killed run can be recognised and removed.
TEMPORARY_MARK = ".partial-"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_MARK}{path.name}-{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allow_umask(path: Path, folder: Path) -> None:
    """Give a file the mode that the user's umask allows; libraries that use temporary files leave 0600.

    ``folder`` was made by this process, so its mode is 0777 without the umask's bits.
    """
    if path.is_file():
        path.chmod(folder.stat().st_mode & 0o666)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # Already gone, or read-only; the next write there reports the latter.
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces ``path``, on any failure it is removed.

    Raises:
        UserError: the folder cannot be made, written to, or is full.
    """
    path = Path(path)
    # In a folder of its own, because libraries put temporary files of theirs beside what they write.
    folder = _temporary_name(path)
    temporary = folder / path.name
    try:
        folder.mkdir(parents=True)
        yield temporary
        allow_umask(temporary, folder)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        remove(folder)


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
        for file in (*sorted(temporary.rglob("*")), temporary):
            allow_umask(file, temporary)
            sync(file)
        if path.exists():
            # A folder cannot be renamed over a full one: move the old one aside first, then drop it.
            old = _temporary_name(path)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Delete temporary files that a killed process left directly in ``folder``, all or those of the file ``name``."""
    for path in Path(folder).glob(
        f"{TEMPORARY_MARK}{'' if name is None else glob.escape(name) + '-'}*"
    ):
        remove(path)


@contextlib.contextmanager
def exclusive_lock(folder: str | Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold an advisory lock on ``folder``, which is made if absent; wait up to ``seconds`` for another holder.

    The system releases it when the process ends, however it ends. A file system without locks grants it always.

    Raises:
        UserError: another process holds it, or the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        end = time.monotonic() + seconds
        while not _locked(handle):
            if time.monotonic() > end:
                raise UserError(
                    f"another process is at work in {folder}; wait for it, or choose another folder"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Take the lock; False if another process holds it. On Windows nothing is locked."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
