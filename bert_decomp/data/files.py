"""The user's own labelled examples: CSV, TSV, JSON-lines or Parquet files as a ``Task``."""

from __future__ import annotations

import glob
import math
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging

from ..errors import UserError
from ..io.json import check_file
from .guards import CHECKS
from .task import Task

# A tenth held out of a file never depends on the run's seed: every run is judged on the same examples.
SPLIT_SEED = 2020

LOADERS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def read_table(paths: list[str]) -> Dataset:
    """Read files of one format as one table.

    Raises:
        UserError: a file is absent, empty, unreadable or of an unknown kind.
    """
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix not in LOADERS:
            raise UserError(
                f"{path}: cannot read files ending in {suffix!r}; use one of {', '.join(LOADERS)}"
            )
        if not Path(path).exists():
            raise UserError(f"{path}: no such file")
        if check_file(path).stat().st_size == 0:
            raise UserError(f"{path} is empty; give a file with examples")
        CHECKS[LOADERS[suffix][0]](path)
    builder, options = LOADERS[suffix]
    names = [glob.escape(str(Path(path).resolve())) for path in paths]
    # The readers log what they then raise.
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        data = load_dataset(builder, data_files=names, split="train", **options)
    except Exception as error:  # whatever three readers make of a damaged file
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{paths[0]} cannot be read as {suffix[1:]}: {reason[0]}") from error
    finally:
        datasets_logging.set_verbosity(verbosity)
    if len(data) == 0:
        raise UserError(f"{paths[0]} holds no examples; give a file with examples")
    return data


def _normalise(
    path: str, data: Dataset, text_columns: list[str] | None, label_column: str
) -> Dataset:
    """Reduce a table to ``text`` [, ``text_pair``] [, ``label``]; default text columns are the first one or two others."""
    if text_columns is None:
        text_columns = [
            name
            for name in data.column_names
            if name != label_column
            and getattr(data.features[name], "dtype", None) in ("string", "large_string")
        ][:2]
    absent = [name for name in text_columns if name not in data.column_names]
    if absent or not 1 <= len(text_columns) <= 2:
        raise UserError(
            f"{path}: one or two text columns are needed, found {text_columns or 'none'} in "
            f"{', '.join(data.column_names)}; name them with text_column_names first,second"
        )
    columns = dict(zip(("text", "text_pair"), text_columns))
    values = {
        new: [str(value) for value in data[old]]
        for new, old in columns.items()
        if all(value is not None for value in data[old])
    }
    labels = data[label_column][:] if label_column in data.column_names else []
    if len(values) != len(columns) or any(label is None for label in labels):
        raise UserError(f"{path} has rows without text or label; remove them")
    return Dataset.from_dict({**values, **({"label": labels} if labels else {})})


def _no_label(path: str, label_column: str, columns: list[str]) -> UserError:
    return UserError(
        f"{path} has no column {label_column!r}; it has {', '.join(columns)}: name the label's with "
        "label_column_name"
    )


def load_labelled(
    path: str,
    label_names: list[str] | None,
    text_columns: list[str] | None = None,
    label_column: str = "label",
) -> Dataset:
    """One file as ``text`` [, ``text_pair``], ``label``, its labels numbered as a model numbers them.

    Args:
        label_names: the model's classes in order, or None for scores (regression).

    Raises:
        UserError: the file cannot be used, or has a label that is not among the names.
    """
    table = read_table([path])
    data = _normalise(path, table, text_columns, label_column)
    if "label" not in data.column_names:
        raise _no_label(path, label_column, table.column_names)
    if label_names is None:
        return with_labels(data, scores(path, data["label"]))
    return with_labels(data, _numbers(path, data["label"], tuple(label_names), "the model lacks"))


def load_files(
    train_file: str,
    validation_file: str | None,
    text_columns: list[str] | None = None,
    label_column: str = "label",
    label_names: list[str] | None = None,
) -> Task:
    """Read a task from CSV, TSV, JSON-lines or Parquet files.

    Float labels make a regression task; every other label is a class. Class names are sorted (or taken from
    ``label_names``, in that order, when a model already knows them). Without a validation file a tenth of the training
    examples is held out, always the same. Training examples may lack the label column if a validation file has it.

    Raises:
        UserError: a file is absent, empty or unreadable, a column is absent, or a label occurs only in validation.
    """
    table = read_table([train_file])
    train, name = _normalise(train_file, table, text_columns, label_column), Path(train_file).stem
    labelled = "label" in train.column_names
    known = train["label"][:] if labelled else None
    if validation_file is None:
        if not labelled:
            raise _no_label(train_file, label_column, table.column_names)
        if len(train) < 2:
            raise UserError(f"{train_file} has one example; give validation_file, or more examples")
        parts = train.train_test_split(test_size=0.1, seed=SPLIT_SEED)
        train, validation, validation_file = parts["train"], parts["test"], train_file
    else:
        validation = _normalise(
            validation_file, read_table([validation_file]), text_columns, label_column
        )
    if "label" not in validation.column_names:
        raise _no_label(
            validation_file if labelled else train_file, label_column, table.column_names
        )
    known, path = (known, train_file) if labelled else (validation["label"][:], validation_file)
    if any(isinstance(label, float) for label in known):
        train = with_labels(train, scores(train_file, train["label"])) if labelled else train
        return Task(
            name, train, with_labels(validation, scores(validation_file, validation["label"])), None
        )
    names = tuple(label_names or sorted({str(label) for label in known}, key=_label_order))
    if len(names) < 2:
        raise UserError(f"{path} has only the label {names[0]!r}; at least two classes are needed")
    if labelled:
        train = with_labels(train, _numbers(train_file, train["label"], names, "the model lacks"))
    return Task(
        name,
        train,
        with_labels(
            validation,
            _numbers(
                validation_file,
                validation["label"],
                names,
                "the model lacks" if label_names else f"{train_file} lacks",
            ),
        ),
        names,
    )


def _numbers(path: str, labels: list, names: tuple[str, ...], lacks: str) -> list[int]:
    index = {label: i for i, label in enumerate(names)}
    foreign = sorted({str(label) for label in labels} - set(names), key=_label_order)
    if foreign:
        raise UserError(
            f"{path} has labels that {lacks}: {', '.join(foreign[:5])}; the known ones are "
            f"{', '.join(names[:8])}: remove those rows, or give the model or examples that have them"
        )
    return [index[str(label)] for label in labels]


def scores(path: str, labels: list) -> list[float]:
    """Labels as finite numbers, or a UserError."""
    try:
        values = [float(label) for label in labels]
        if not all(map(math.isfinite, values)):
            raise ValueError
        return values
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path} has labels that are no finite numbers, but scores are needed (regression)"
        ) from None


def with_labels(data: Dataset, labels: list) -> Dataset:
    """The same texts with these labels."""
    data = data.remove_columns("label") if "label" in data.column_names else data
    return data.add_column("label", labels)


def _label_order(label: str) -> tuple:
    """Integers by value, before any other names by spelling."""
    return (0, int(label), label) if label.removeprefix("-").isdecimal() else (1, 0, label)
