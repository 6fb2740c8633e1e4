"""The nine tasks of GLUE (Wang et al., ICLR 2019), laid out as the hub's ``nyu-mll/glue``, from there or from a folder.

A folder holds one subfolder a task, as the hub's repository does: ``cola/train*``, ``cola/validation*``, Parquet or any
other format that the user's own files may have, with the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .columns import texts_of
from .labels import scores
from .schema import Reading
from .table import Table
from .tables import READERS, read_table
from .task import Task, register_task

if TYPE_CHECKING:
    from datasets import Dataset

REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """Text columns, class names in label order (None for scores), the metric that leads, and the held-out splits."""

    texts: tuple[str, ...]
    label_names: tuple[str, ...] | None
    main_metric: str = "accuracy"
    validation: tuple[str, ...] = ("validation",)


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "stsb": GlueTask(("sentence1", "sentence2"), None, "spearmanr"),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def _from_hub(name: str, split: str) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = load_dataset(REPOSITORY, name, split=split)
    except (OSError, DatasetNotFoundError, ValueError) as error:
        raise UserError(
            f"GLUE's {name} is not in the local cache and cannot be fetched; on a machine with access run: hf download "
            f"{REPOSITORY} --repo-type dataset --include '{name}/*' --local-dir glue, and give data_dir glue"
        ) from error
    return Table(REPOSITORY, "hub", {column: data[column][:] for column in data.column_names})


def _from_folder(folder: Path, name: str, split: str) -> Table:
    files = sorted(
        file for file in (folder / name).glob(f"{split}*") if file.suffix.lower() in READERS
    )
    # validation_matched* does not name validation* of another task: each split is asked for by its full name.
    files = [file for file in files if file.name[len(split) :][:1] in (".", "-")]
    if not files or len({file.suffix for file in files}) > 1:
        raise UserError(
            f"{folder / name} has {'several kinds of' if files else 'no'} files {split}*; it should hold the "
            f"{split} split as {REPOSITORY} does, such as {split}-00000-of-00001.parquet"
        )
    first, *others = (read_table(str(file)) for file in files)
    different = next((part for part in others if list(part.columns) != list(first.columns)), None)
    if different is not None:
        raise UserError(f"{different.path} has other columns than {first.path}")
    if not others:
        return first
    columns = {
        column: [value for part in (first, *others) for value in part.columns[column]]
        for column in first.columns
    }
    return replace(first, columns=columns, lines=None)


def load_glue(name: str, data_dir: str | None = None) -> Task:
    """One task of GLUE, from the hub's cache or from a folder of files.

    Raises:
        UserError: the data are in neither, a column is absent, or a label is out of range.
    """
    task = GLUE[name]

    def read(split: str) -> tuple[Dataset, Reading]:
        table = _from_folder(Path(data_dir), name, split) if data_dir else _from_hub(name, split)
        return _examples(replace(table, path=f"the {split} split of {name}"), task)

    parts = {"validation": read(task.validation[0])}
    parts |= {split.removeprefix("validation_"): read(split) for split in task.validation[1:]}
    parts["train"] = read("train")
    data = {split: examples for split, (examples, _) in parts.items()}
    return Task(
        name,
        data.pop("train"),
        data.pop("validation"),
        task.label_names,
        task.main_metric,
        data,
        {split: reading for split, (_, reading) in parts.items()},
    )


def _examples(table: Table, task: GlueTask) -> tuple[Dataset, Reading]:
    from datasets import Dataset

    absent = [column for column in (*task.texts, "label") if column not in table.columns]
    if absent:
        raise UserError(
            f"{table.path} has no column {absent[0]!r}; it has {', '.join(table.columns)}"
        )
    texts, notes = texts_of(table, task.texts)
    values = table.columns["label"]
    if task.label_names is None:
        labels = scores(table.path, values).values
    else:
        known = {str(number): number for number in range(len(task.label_names))}
        wrong = next((value for value in values if str(value) not in known), None)
        if wrong is not None or None in values:
            raise UserError(
                f"{table.path} has the label {wrong}; labels go from 0 to {len(task.label_names) - 1} "
                "(a split without answers, such as GLUE's test, cannot be used)"
            )
        labels = [known[str(value)] for value in values]
    reading = Reading(
        table.path,
        len(table),
        table.layout,
        task.texts,
        "label",
        tuple(column for column in table.columns if column not in (*task.texts, "label")),
        dict(
            zip(map(str, range(len(task.label_names or ()))), task.label_names or (), strict=True)
        ),
        notes=table.notes + notes,
    )
    return Dataset.from_dict({**texts, "label": labels}), reading


for _name in GLUE:
    register_task(_name, from_folder=True)(partial(load_glue, _name))
