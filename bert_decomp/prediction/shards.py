"""The files of a job over texts: one Parquet file a window, written whole or not at all, joined in the end.

A folder beside the output holds them, with a manifest that says what they belong to. Whatever is killed, the next run
finds whole shards of the same job or none, so no row is lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..io.atomic import atomic_file, remove, remove_leftovers
from ..io.json import read_json, write_json
from .outputs import FORMATS, KEY, record_of, rows_of_parquet

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "job.json"


def fingerprint_of(settings: dict[str, Any]) -> str:
    """A digest of everything that the answers depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class Shards:
    """The shards of one job.

    Args:
        output: the file that they become.
        settings: everything that the answers depend on, as plain values.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings
        self.fingerprint = fingerprint_of(settings)
        self.format = FORMATS[output.suffix]
        self.folder = output.with_name(f"{output.name}.parts")

    def finished(self) -> int | None:
        """Rows of the output if this job wrote it already; None if it is not there.

        Raises:
            UserError: another file is in its place.
        """
        if not self.output.exists():
            return None
        rows = self.format.rows(self.output, self.fingerprint)
        if rows is None:
            raise UserError(
                f"{self.output} exists and was not made of this input by this model and these settings; remove it or "
                "choose another output"
            )
        remove(self.folder)
        self._remove_leftovers()
        return rows

    def _remove_leftovers(self) -> None:
        """Drop what a killed run left half-written beside the output."""
        for path in (self.output, record_of(self.output)):
            remove_leftovers(path.parent, path.name)

    def open(self) -> None:
        """Make the folder, or check that it is this job's; drop what a killed run left half-written.

        Raises:
            UserError: it holds another job.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self._remove_leftovers()
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            write_json(manifest, self.settings)
            return
        before = read_json(manifest)
        if before != self.settings:
            differs = [
                name
                for name, value in self.settings.items()
                if not isinstance(before, dict) or before.get(name) != value
            ]
            raise UserError(
                f"{self.folder} holds the first part of another job ({', '.join(differs) or 'settings'} differ); "
                "remove it, or choose another output"
            )

    def path(self, number: int) -> Path:
        """The file of a window."""
        return self.folder / f"{number:07}.parquet"

    def has(self, number: int, rows: int) -> bool:
        """Whether the shard of a window is there."""
        path = self.path(number)
        return path.exists() and rows_of_parquet(path, self.fingerprint) == rows

    def write(self, number: int, table: pa.Table) -> None:
        """Write one shard."""
        import pyarrow.parquet

        with atomic_file(self.path(number)) as temporary:
            pyarrow.parquet.write_table(
                table.replace_schema_metadata({KEY: self.fingerprint}),
                temporary,
                write_page_checksum=True,
            )

    def join(self, rows_of_shards: list[int]) -> None:
        """Write the output from all shards in order, then remove them.

        Raises:
            UserError: a shard is damaged or missing.
        """
        tables = (self._read(number, rows) for number, rows in enumerate(rows_of_shards))
        with atomic_file(self.output) as temporary:
            self.format.write(self.output, temporary, tables, self.fingerprint)
        remove(self.folder)

    def _read(self, number: int, rows: int) -> pa.Table:
        import pyarrow.parquet

        path = self.path(number)
        try:
            if not self.has(number, rows):
                raise OSError("it is not this job's")
            return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read()
        except OSError as error:
            # Computed again by the next run.
            remove(path)
            raise UserError(
                f"{path} was damaged ({error}) and is removed; the same command writes it again"
            ) from error
