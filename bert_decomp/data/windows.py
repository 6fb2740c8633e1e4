"""The texts of a file that may be larger than memory, in order, a window at a time.

The rules are those of ``tables``: nothing is dropped, merged or retyped, and a row that does not fit is named. What
needs the whole file there (both readings of a TSV, a list as one JSON value) is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..io.json import check_file
from ..io.manifest import digest_of
from .column_pieces import dataset_pieces, parquet_pieces
from .columns import texts_of, unlabelled_columns
from .conll import conll_pieces
from .pieces import Piece, csv_pieces, json_pieces
from .squad import squad_or_rows
from .table import Table
from .tokens import words_of

if TYPE_CHECKING:
    import pyarrow as pa

# A window ends at whichever comes first. Its rows are sorted by length, so more of them mean less padding; all of them
# are lost if the process is killed before its end.
WINDOW_ROWS, WINDOW_BYTES = 4096, 2**19

READERS: dict[str, Callable[..., Iterator[Piece]]] = {
    ".csv": csv_pieces,
    ".jsonl": json_pieces,
    ".json": squad_or_rows,
    ".parquet": parquet_pieces,
    ".conll": conll_pieces,
}


@dataclass(frozen=True)
class Window:
    """Consecutive rows: ``texts`` has one or two lists of them, ``kept`` (pyarrow) what is carried along.

    A text that is split into words is a list itself.
    """

    number: int
    texts: list[list[Any]]
    kept: pa.Table

    def __len__(self) -> int:
        return len(self.texts[0])


@dataclass(frozen=True)
class TextSource:
    """A file of texts, or a folder that ``datasets`` saved.

    Attributes:
        path: the file or folder.
        text_columns: the one or two columns with text.
        keep: columns that are carried along.
        words: whether texts are split into words.
        rows: how many there are; 0 before ``checked``.
        schema: names and types (pyarrow) of the columns that are carried along; None before ``checked``.
    """

    path: str
    text_columns: tuple[str, ...]
    keep: tuple[str, ...]
    words: bool
    rows: int = 0
    schema: pa.Schema | None = None

    @classmethod
    def open(
        cls,
        path: str,
        text_column_names: Sequence[str] | None = None,
        keep: Sequence[str] = (),
        choose: Callable[[Table, Sequence[str] | None], tuple[str, ...]] = unlabelled_columns,
    ) -> TextSource:
        """Choose the columns by the first rows.

        Args:
            text_column_names: the columns with text that the user names.
            keep: columns to carry along; ("all",) for every one.
            choose: finds the columns with text; see ``Kind.text_columns``.

        Raises:
            UserError: the file is absent or of another kind, or it is not clear which columns hold the text.
        """
        first = next(_pieces(path), None)
        if first is None or len(first.table) == 0:
            raise UserError(f"{path} holds no rows; give a file with texts")
        table = first.table
        columns = choose(table, text_column_names)
        carried = list(table.columns) if list(keep) == ["all"] else list(dict.fromkeys(keep))
        absent = [name for name in carried if name not in table.columns]
        if absent:
            raise UserError(
                f"{path} has no column {absent[0]!r} to keep; it has {', '.join(table.columns)}"
            )
        words = any(isinstance(value, list) for value in table.columns[columns[0]])
        return cls(path, columns, tuple(carried), words)

    def checked(self) -> TextSource:
        """Read everything once, so that an hour's work never ends at a row that does not fit, and count the rows.

        Raises:
            UserError: a row cannot be used, or values of a carried column have no common type.
        """
        import pyarrow as pa

        rows, schemas = 0, []
        for window in self.windows():
            rows += len(window)
            if window.kept.schema not in schemas:
                schemas.append(window.kept.schema)
        if rows == 0:
            raise UserError(f"{self.path} holds no rows; give a file with texts")
        try:
            schema = pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(
                f"{self.path}: a column to keep has values of different types ({_first_line(error)})"
            ) from error
        return replace(self, rows=rows, schema=schema)

    def windows(self) -> Iterator[Window]:
        """Every row in order. The division into windows is always the same for the same file.

        Raises:
            UserError: a row cannot be used.
        """
        import pyarrow as pa

        wanted = list(dict.fromkeys((*self.text_columns, *self.keep)))
        for number, piece in enumerate(_pieces(self.path, wanted)):
            if self.words:
                texts: list[list[Any]] = [words_of(piece.table, name) for name in self.text_columns]
            else:
                texts = list(texts_of(piece.table, self.text_columns)[0].values())
            try:
                kept = piece.arrow(self.keep)
                if self.schema is not None:
                    kept = kept.cast(self.schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise UserError(
                    f"{piece.table.where([0, len(piece.table) - 1])} of {self.path}: a column to keep has values of "
                    f"different types ({_first_line(error)})"
                ) from error
            yield Window(number, texts, kept)

    def digest(self) -> str:
        """The SHA-256 of the file; of a folder, of its files' together."""
        path = Path(self.path)
        if not path.is_dir():
            return digest_of(path)
        return "-".join(digest_of(file)[:16] for file in sorted(path.glob("*")) if file.is_file())


def _pieces(path: str, names: Sequence[str] | None = None) -> Iterator[Piece]:
    if Path(path).is_dir():
        yield from dataset_pieces(path, WINDOW_ROWS, WINDOW_BYTES, names)
        return
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f"{path}: cannot read texts from files ending in {suffix!r}; use one of {', '.join(READERS)}, or a folder "
            "of datasets' save_to_disk"
        )
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if check_file(path).stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with texts")
    try:
        yield from READERS[suffix](path, WINDOW_ROWS, WINDOW_BYTES, names)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
