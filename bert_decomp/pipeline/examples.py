"""The text of the main job: the task that was asked for, and its examples as a model's tokenizer encodes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..data.batches import batches, slices
from ..data.files import ReadOptions
from ..data.task import Task, load_task
from ..distillation.teacher import labels_of
from ..errors import UserError
from ..kinds import EMBEDDING, KINDS, SINGLE_LABEL, Kind, kind_of
from ..models.folders import kind_of_folder
from .options import DataArguments

# Tokens in a batch of calibration at most: what its backward pass keeps is more than the statistics themselves.
CALIBRATION_TOKENS = 2048

Batches = list[dict[str, Tensor]]


def read_task(data: DataArguments, model_name_or_path: str) -> Task:
    """The task or files that ``data`` names, shortened as it asks, labels in the order of a fine-tuned model's.

    Raises:
        UserError: the text cannot be read.
    """
    if data.train_file is not None:
        columns = data.text_column_names.split(",") if data.text_column_names else None
        kind = asked_kind(data.problem_type, model_name_or_path)
        labels = labels_of(model_name_or_path, kind)
        options = ReadOptions(columns, data.label_column_name, labels, data.problem_type)
        task = kind.read(data.train_file, data.validation_file, options)
    elif data.task_name is not None:
        task = load_task(data.task_name, data.data_dir)
    else:
        raise UserError("there is no text; give task_name or train_file")
    return task.limited(data.max_train_samples, data.max_eval_samples)


def asked_kind(problem_type: str | None, model_name_or_path: str) -> Kind:
    """The kind of task that reads the user's files: the one asked for, the model's own, or a text classifier's.

    Raises:
        UserError: there is no such kind, or no such model.
    """
    if problem_type is None:
        found = kind_of_folder(model_name_or_path)
        # An embedder may be there to be fine-tuned as a classifier.
        return SINGLE_LABEL if found is None or found is EMBEDDING else found
    if problem_type not in KINDS:
        raise UserError(f"unknown problem_type {problem_type!r}; choose {' or '.join(KINDS)}")
    return KINDS[problem_type]


def check_best_metric(task: Task, training: TrainingArguments) -> None:
    """Raise a UserError if the best model is chosen by a metric that the validation examples cannot give."""
    if training.eval_strategy == "no":
        return
    if not KINDS[task.kind].evaluates_in_training:
        raise UserError(f"eval_strategy has no meaning for the task {task.kind}; leave it out")
    if training.metric_for_best_model is None:
        return
    names = ("loss", *KINDS[task.kind].metric_names(task))
    if training.metric_for_best_model.removeprefix("eval_") not in names:
        raise UserError(
            f"metric_for_best_model is {training.metric_for_best_model}, which the validation examples cannot give; "
            f"choose one of {', '.join(names)}"
        )


@dataclass
class Examples:
    """A task's text as one tokenizer encodes it; what is made of it is made once.

    Args:
        train, validation: encoded examples, see ``Kind.encode``.
        others: further held-out splits by name.
        calibration_samples: how many training examples statistics are collected from.
        batch_size: of calibration, at most, and of evaluation.
        seed: decides which examples those are.
        kind: of the task.
    """

    train: Dataset
    validation: Dataset
    others: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    calibration_samples: int
    batch_size: int
    seed: int
    kind: Kind

    @classmethod
    def of(
        cls,
        task: Task,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        **settings: int,
    ) -> Examples:
        """Encode every split of ``task``, cut to ``max_seq_length`` tokens, for a teacher of its kind."""
        kind = kind_of(teacher)
        max_seq_length = kind.limit(max_seq_length)
        train, validation, *more = (
            kind.encode(split, tokenizer, max_seq_length)
            for split in (task.train, task.validation, *task.others.values())
        )
        others = dict(zip(task.others, more, strict=True))
        found = cls(train, validation, others, tokenizer, kind=kind, **settings)
        found.validation = kind.with_reference(validation, teacher, found.batches(validation))
        return found

    def batches(self, data: Dataset) -> Batches:
        """Examples as padded batches."""
        return batches(data, self.tokenizer, self.batch_size, self.kind.collator(self.tokenizer))

    def sample(self, count: int) -> Batches:
        """Batches of ``count`` training examples drawn by the seed, of ``CALIBRATION_TOKENS`` at most."""
        chosen = self.train.shuffle(seed=self.seed).select(range(min(count, len(self.train))))
        padded = self.batches(chosen)
        return [part for batch in padded for part in slices(batch, CALIBRATION_TOKENS)]

    @cached_property
    def calibration(self) -> Batches:
        """The examples that statistics are collected from."""
        return self.sample(self.calibration_samples)

    @cached_property
    def held_out(self) -> Batches:
        """The evaluation examples."""
        return self.batches(self.validation)
