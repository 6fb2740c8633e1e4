"""The nine tasks of GLUE (Wang et al., ICLR 2019) as the hub's ``nyu-mll/glue`` lays them out, from there or from a folder.

A folder holds one subfolder a task, as the hub's repository does: ``cola/train*``, ``cola/validation*``, Parquet or any
other format that the user's own files may have, with the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .files import LOADERS, read_table, scores, with_labels
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


def _from_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(REPOSITORY, name, split=split)
    except (OSError, DatasetNotFoundError, ValueError) as error:
        raise UserError(
            f"GLUE's {name} is not in the local cache and cannot be fetched; on a machine with access run: hf download "
            f"{REPOSITORY} --repo-type dataset --include '{name}/*' --local-dir glue, and give data_dir glue"
        ) from error


def _from_folder(folder: Path, name: str, split: str) -> Dataset:
    files = sorted(
        file for file in (folder / name).glob(f"{split}*") if file.suffix.lower() in LOADERS
    )
    # validation_matched* does not name validation* of another task: each split is asked for by its whole name.
    files = [file for file in files if file.name[len(split) :][:1] in (".", "-")]
    if not files or len({file.suffix for file in files}) > 1:
        raise UserError(
            f"{folder / name} has {'several kinds of' if files else 'no'} files {split}*; it should hold the "
            f"{split} split as {REPOSITORY} does, such as {split}-00000-of-00001.parquet"
        )
    return read_table([str(file) for file in files])


def load_glue(name: str, data_dir: str | None = None) -> Task:
    """One task of GLUE, from the hub's cache or from a folder of files.

    Raises:
        UserError: the data are in neither, a column is absent, or a label is out of range.
    """
    about = GLUE[name]

    def read(split: str) -> Dataset:
        data = _from_folder(Path(data_dir), name, split) if data_dir else _from_hub(name, split)
        absent = [column for column in (*about.texts, "label") if column not in data.column_names]
        if absent:
            raise UserError(
                f"the {split} split of {name} has no column {absent[0]!r}; it has {', '.join(data.column_names)}"
            )
        return _plain(data, about, f"the {split} split of {name}")

    first, *others = (read(split) for split in about.validation)
    return Task(
        name,
        read("train"),
        first,
        about.label_names,
        about.main_metric,
        {
            split.removeprefix("validation_"): part
            for split, part in zip(about.validation[1:], others)
        },
    )


def _plain(data: Dataset, about: GlueTask, where: str) -> Dataset:
    from datasets import Dataset

    columns = {new: data[old][:] for new, old in zip(("text", "text_pair"), about.texts)}
    labels = data["label"][:]
    if any(not isinstance(text, str) for texts in columns.values() for text in texts):
        raise UserError(f"{where} has rows without text; remove them")
    if about.label_names is None:
        labels = scores(where, labels)
    else:
        wrong = next(
            (label for label in labels if label not in range(len(about.label_names))), None
        )
        if wrong is not None:
            raise UserError(
                f"{where} has the label {wrong!r}; labels go from 0 to {len(about.label_names) - 1} "
                "(a split without answers, such as GLUE's test, cannot be used)"
            )
    return with_labels(Dataset.from_dict(columns), labels)


for _name in GLUE:
    register_task(_name, from_folder=True)(partial(load_glue, _name))
