"""A ``Task``: labelled text in two datasets, and what its labels mean.

A named task is one function registered with ``register_task``: the embedded ones in ``demo.py``, GLUE's in
``glue.py``. The user's own files are read by ``files.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .model_labels import CLASSIFICATION, REGRESSION
from .schema import Reading

if TYPE_CHECKING:
    from datasets import Dataset

# Names that files and folders of every data set have, also as the hub numbers the parts of a split.
COMMON_NAME = re.compile(
    r"(train|training|dev|valid|validation|test|eval|data|dataset)(-\d+-of-\d+)?", re.IGNORECASE
)


def name_of_files(train_file: str) -> str:
    """What a task is called whose training examples are a file: the file, or what it lies in if that says more.

    >>> name_of_files("reviews.csv"), name_of_files("imdb/data/train.csv")
    ('reviews', 'imdb')
    """
    path = Path(os.path.abspath(train_file))
    names = [path.stem, *(parent.name for parent in path.parents)]
    return next((name for name in names if name and not COMMON_NAME.fullmatch(name)), path.stem)


@dataclass(frozen=True)
class Task:
    """A task: ``train`` and ``validation`` have ``text`` (str), optionally ``text_pair`` (str), and ``label``.
    (Of tokens and of questions they have other columns; see ``data.tokens`` and ``data.questions``.)

    ``label_names`` is None for regression (float labels), else the names of the integer labels 0, 1, ... (of the
    columns, where labels are rows of 0.0 and 1.0). ``kind`` is the kind of task as ``problem_type`` names it; left out,
    it is told from the names. ``train`` may lack ``label``: then only a fine-tuned teacher can say what to learn.
    ``main_metric`` is the one that leads (None: the usual one of its kind of label); ``others`` are further held-out
    splits, such as MNLI's mismatched one. ``readings`` says how each split was read.
    """

    name: str
    train: Dataset
    validation: Dataset
    label_names: tuple[str, ...] | None
    main_metric: str | None = None
    others: dict[str, Dataset] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            kind = REGRESSION if self.label_names is None else CLASSIFICATION
            object.__setattr__(self, "kind", kind)

    @property
    def is_regression(self) -> bool:
        return self.kind == REGRESSION

    @property
    def num_outputs(self) -> int:
        """How many numbers a model gives for an example: one for regression, else one a label."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def is_labelled(self) -> bool:
        """Whether the training examples have labels."""
        return bool({"label", "answers"} & set(self.train.column_names))

    @property
    def fingerprint(self) -> str:
        """A digest of every text and label, to recognise results made from the same data."""
        digest = hashlib.sha256(repr((self.name, self.label_names)).encode())
        # Two kinds may read the same rows; the one that follows from the names is said by them.
        if self.kind not in (REGRESSION, CLASSIFICATION):
            digest.update(self.kind.encode())
        for split in (self.train, self.validation, *self.others.values()):
            for column in sorted(split.column_names):
                digest.update(column.encode())
                for value in split[column]:
                    digest.update(repr(value).encode())
        return digest.hexdigest()[:16]

    def limited(self, max_train_samples: int | None, max_eval_samples: int | None) -> Task:
        """The same task with at most that many first examples of each split."""

        def head(split: Dataset, name: str, limit: int | None) -> Dataset:
            if limit is not None and limit < 1:
                raise UserError(f"{name} is {limit}; give a number of at least 1")
            return split if limit is None else split.select(range(min(limit, len(split))))

        parts = {"train": self.train, "validation": self.validation, **self.others}
        limits = {name: max_eval_samples for name in parts} | {"train": max_train_samples}
        words = {name: "max_eval_samples" for name in parts} | {"train": "max_train_samples"}
        heads = {name: head(part, words[name], limits[name]) for name, part in parts.items()}
        readings = {
            name: reading.without(len(parts[name]) - len(heads[name]), f"beyond {words[name]}")
            for name, reading in self.readings.items()
        }
        train, validation = heads.pop("train"), heads.pop("validation")
        return replace(self, train=train, validation=validation, others=heads, readings=readings)


TASKS: dict[str, Callable[..., Task]] = {}
# Those whose function takes the folder of their files.
FROM_FOLDER: set[str] = set()


def register_task(
    name: str, from_folder: bool = False
) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Register a function that returns the task called ``name``.

    Args:
        from_folder: the function takes one argument, the folder with the task's files (a string, or None).
    """

    def register(load: Callable[..., Task]) -> Callable[..., Task]:
        TASKS[name] = load
        if from_folder:
            FROM_FOLDER.add(name)
        return load

    return register


def load_task(name: str, data_dir: str | None = None) -> Task:
    """Load a named task.

    Args:
        data_dir: where the files of a GLUE task are; without it they come from the hub's cache.

    Raises:
        UserError: no such task, or its material is not installed.
    """
    if name not in TASKS:
        raise UserError(
            f"unknown task {name!r}; choose one of {', '.join(sorted(TASKS))}, or give train_file"
        )
    if data_dir is not None and name not in FROM_FOLDER:
        raise UserError(f"data_dir is for GLUE's tasks; {name} brings its own data")
    return TASKS[name](data_dir) if name in FROM_FOLDER else TASKS[name]()
