"""Writing results so that no partial file is ever taken for a whole one.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed into place, so a
reader sees the old file, the new one, or none. Folders that a library fills in its own way are sealed instead: they count
once a list of their files' digests is there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing can be locked there
    fcntl = None

# One marker for every temporary name, so that leftovers of a killed run can be recognised and removed.
TEMPORARY_MARK = ".partial-"
# Bytes of the longest JSON file that is read: parsing takes some twenty times the text, and no honest one comes near.
JSON_LIMIT = 16 * 2**20
SEAL = "files.json"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_MARK}{path.name}-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # Nothing to see to: it is gone, or the place is not to be written to, which whoever writes there has found out.
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
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
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
            _sync(file)
        if path.exists():
            # A folder cannot be renamed over a full one: move the old one aside first, then drop it.
            old = _temporary_name(path)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        remove(temporary)


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
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
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
        raise UserError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); write it anew"
        ) from error


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
        raise UserError(
            f"{source} is not a JSON file ({error}); write it anew or name another file"
        ) from error


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is absent, unreadable, longer than ``limit`` bytes or not JSON.
    """
    return parse_json(read_text(path, limit), path)


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Delete what a killed run left half-written directly in ``folder``: everything, or of the file ``name`` alone."""
    for path in Path(folder).glob(
        f"{TEMPORARY_MARK}{'' if name is None else glob.escape(name) + '-'}*"
    ):
        remove(path)


def digest_of(path: str | Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: str | Path) -> None:
    """Flush every file below ``folder`` to the disk, and then list them with their digests, by which ``is_whole`` knows it.

    Raises:
        UserError: the list cannot be written.
    """
    folder = Path(folder)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(TEMPORARY_MARK)
    ]
    for path in files:
        _sync(path)
    write_json(
        folder / SEAL,
        {
            path.relative_to(folder).as_posix(): digest_of(path)
            for path in files
            if path.name != SEAL
        },
    )


def is_whole(folder: str | Path) -> bool:
    """Whether ``folder`` was sealed and every file is as it was then."""
    folder = Path(folder)
    try:
        listed = read_json(folder / SEAL)
        return isinstance(listed, dict) and all(
            digest_of(folder / name) == digest for name, digest in listed.items()
        )
    except (UserError, OSError):
        return False


@contextlib.contextmanager
def only_one(folder: str | Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold ``folder``, which is made if absent, against other processes; wait up to ``seconds`` for one that has it.

    The system lets go of it when the process ends, in whatever way. Where a file system knows no locks there are none.

    Raises:
        UserError: another process keeps it, or it cannot be made.
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
                    f"another process is at work in {folder}; let it end, or choose another folder"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Take the lock, or say that another has it."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
