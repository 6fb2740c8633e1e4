"""The dense teacher: a fine-tuned model as it is, or a pre-trained encoder fine-tuned on the task first."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..data.batches import batches, length_order
from ..data.model_labels import ModelLabels
from ..data.task import Task
from ..errors import UserError
from ..io.atomic import atomic_file, exclusive_lock, remove_leftovers
from ..io.safetensors import open_tensors
from ..kinds import KINDS, Kind, kind_of, model_inputs
from ..models.folders import fingerprint_of_checkpoint, load_config
from ..models.loading import load_model, load_tokenizer
from ..models.saving import save
from ..statistics import fingerprint
from .resumable import ResumableTrainer, fit

logger = logging.getLogger("bert_decomp")

# Training examples from which a fine-tuned teacher's config is settled (see ``Kind.settle_``).
SETTLING_EXAMPLES = 2000


def labels_of(name_or_path: str, kind: Kind) -> ModelLabels | None:
    """The labels of a model fine-tuned for ``kind``; None for a bare encoder.

    Raises:
        UserError: the model cannot be loaded, or has labels that cannot be used (see ``ModelLabels.of``).
    """
    config = load_config(name_or_path)
    if not kind.labelled or not kind.has_head(config):
        return None
    return ModelLabels.of(config, name_or_path)


def check_labels(model: PreTrainedModel, name_or_path: str, task: Task) -> None:
    """Raise a UserError unless the model has the task's labels."""
    if not KINDS[task.kind].labelled:
        return
    if model.config.num_labels != task.num_outputs:
        raise UserError(
            f"{name_or_path} has {model.config.num_labels} labels but the task {task.name} has {task.num_outputs}; "
            "give a model fine-tuned on this task, or a pre-trained encoder"
        )
    known = ModelLabels.of(model.config, name_or_path).names
    if known is None or task.label_names is None:
        return
    # NEGATIVE and negative are one class in two spellings.
    if [name.casefold() for name in known] != [name.casefold() for name in task.label_names]:
        raise UserError(
            f"{name_or_path} calls its labels {', '.join(known[:6])} but the task {task.name} has "
            f"{', '.join(task.label_names[:6])}; give a model fine-tuned on this task"
        )


def check_teachable(name_or_path: str, task: Task) -> None:
    """Raise a UserError if the task has no labels and the model would need some."""
    if not task.is_labelled and not KINDS[task.kind].has_head(load_config(name_or_path)):
        raise UserError(
            f"{name_or_path} is a bare encoder and {task.name} has no labels to fine-tune it on; give a "
            "fine-tuned classifier, or labelled examples"
        )


def load_teacher(name_or_path: str, task: Task) -> PreTrainedModel:
    """Load a fine-tuned model as the teacher.

    Raises:
        UserError: it does not have the task's labels.
    """
    kind = KINDS[task.kind]
    model = load_model(name_or_path, kind)
    check_labels(model, name_or_path, task)
    # Left out, a model notes it at its first step of training, so that one resumed after its last step would be saved
    # without.
    if kind.problem_type is not None:
        model.config.problem_type = model.config.problem_type or kind.problem_type
    return model


def prepare_teacher(
    name_or_path: str,
    task: Task,
    cache: Path,
    *,
    max_seq_length: int,
    num_train_epochs: float,
    learning_rate: float,
    training: TrainingArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the fine-tuned dense model for a task, and its tokenizer.

    A checkpoint of a classifier is used as it is. A bare encoder is fine-tuned with ``training``'s batch size, seed and
    schedule, and the result is kept in ``cache`` under a digest of everything that made it, for the next run.

    Raises:
        UserError: nothing loadable is there, or the model does not fit the task.
    """
    check_teachable(name_or_path, task)
    tokenizer, kind = load_tokenizer(name_or_path), KINDS[task.kind]
    if kind.has_head(load_config(name_or_path)):
        return load_teacher(name_or_path, task), tokenizer
    recipe = {
        "recipe": kind.recipe,
        "encoder": fingerprint_of_checkpoint(name_or_path),
        "task": task.fingerprint,
        "max_seq_length": max_seq_length,
        "epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "batch": training.train_batch_size * training.world_size,
        "accumulation": training.gradient_accumulation_steps,
        "sampling": str(training.train_sampling_strategy),
        "schedule": str(training.lr_scheduler_type),
        "warmup": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "seed": training.seed,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "teachers" / f"{task.name}-{Path(name_or_path).name}-{digest}"
    config, work = folder / "config.json", folder.with_name(folder.name + "-training")
    found = config.is_file()
    with ExitStack() as held:
        with training.main_process_first(local=False):
            if training.process_index == 0 and not config.is_file():
                # Another run that fine-tunes the same teacher is waited for.
                held.enter_context(exclusive_lock(work, seconds=math.inf))
                remove_leftovers(folder.parent, folder.name)
        if not config.is_file():
            train = kind.encode(task.train, tokenizer, max_seq_length)
            arguments = replace(
                training,
                output_dir=str(work),
                num_train_epochs=num_train_epochs,
                learning_rate=learning_rate,
                max_steps=-1,
                eval_strategy="no",
                load_best_model_at_end=False,
                resume_from_checkpoint=None,
            )
            _fine_tune(name_or_path, task, train, tokenizer, arguments, folder)
        if training.process_index == 0:
            shutil.rmtree(work, ignore_errors=True)
    if found:
        logger.info("teacher: using %s, fine-tuned by an earlier run", folder)
    return load_teacher(str(folder), task), tokenizer


class _OwnLoss(ResumableTrainer):
    """``ResumableTrainer`` with the loss of the kind of task in place of the model's."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**model_inputs(inputs))
        loss = kind_of(self.model).task_loss(outputs, inputs)
        assert loss is not None  # only labelled examples are trained on
        loss = self._share * loss
        return (loss, outputs) if return_outputs else loss


def _fine_tune(
    name_or_path: str,
    task: Task,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    folder: Path,
) -> None:
    set_seed(arguments.seed)
    kind = KINDS[task.kind]
    model = load_model(name_or_path, kind, problem_type=kind.problem_type, **kind.head_config(task))
    kind.start_(model, train)
    trainer = _OwnLoss if kind.own_loss else ResumableTrainer
    fit(
        trainer(
            model,
            arguments,
            train_dataset=train,
            processing_class=tokenizer,
            data_collator=kind.collator(tokenizer),
        )
    )
    some = train.select(range(min(SETTLING_EXAMPLES, len(train))))
    kind.settle_(
        model, batches(some, tokenizer, arguments.eval_batch_size, kind.collator(tokenizer))
    )
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            save(model, tokenizer, folder)


@torch.inference_mode()
def with_teacher_logits(
    teacher: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    batch_size: int,
) -> Dataset:
    """The encoded examples with a column ``teacher_logits``, from the file ``path`` or computed and kept there.

    Raises:
        UserError: the file was made by another teacher or from other examples.
    """
    kind = kind_of(teacher)
    padded = batches(train, tokenizer, batch_size, kind.collator(tokenizer))
    digest = fingerprint(teacher, padded)
    if path.is_file():
        with open_tensors(path) as file:
            known, logits = (file.metadata() or {}).get("fingerprint"), file.get_tensor("logits")
        if known != digest or len(logits) != len(train):
            raise UserError(f"{path} was made by another teacher or from other examples; delete it")
    else:
        parts = []
        for batch in tqdm(padded, desc="teacher logits", leave=False):
            inputs = model_inputs(batch, teacher.device)
            parts.append(kind.answers(teacher(**inputs), inputs).float().cpu())
        found = torch.cat(parts)
        logits = torch.empty_like(found)
        logits[length_order(train)] = found
        with atomic_file(path) as temporary:
            save_file({"logits": logits}, temporary, metadata={"fingerprint": digest})
    return train.add_column("teacher_logits", logits.tolist())
