"""Manifests: a folder that a library fills in its own way counts as complete once its files' digests are listed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import UserError
from .atomic import TEMPORARY_MARK, allow_umask, sync
from .json import read_json, write_json

MANIFEST = "files.json"


def digest_of(path: str | Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: str | Path) -> None:
    """Flush every file below ``folder`` to the disk, then list them with their digests, for ``verify_manifest``.

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
        allow_umask(path, folder)
        sync(path)
    write_json(
        folder / MANIFEST,
        {
            path.relative_to(folder).as_posix(): digest_of(path)
            for path in files
            if path.name != MANIFEST
        },
    )


def verify_manifest(folder: str | Path) -> bool:
    """Whether ``folder`` has a manifest and every file in it is unchanged since."""
    folder = Path(folder)
    try:
        listed = read_json(folder / MANIFEST)
        return isinstance(listed, dict) and all(
            digest_of(folder / name) == digest for name, digest in listed.items()
        )
    except (UserError, OSError):
        return False
