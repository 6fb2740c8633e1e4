"""``distil``: train a decomposed model to compute what its dense teacher computes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from ..kinds import kind_of
from ..models.format import refuse_fused
from .losses import DistillationConfig
from .resumable import fit
from .trainer import DistillationTrainer


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments | None = None,
    *,
    distillation: DistillationConfig | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, Any]]:
    """Train ``student`` in place on what ``teacher`` computes, and return the training's log.

    Feature distillation as in Ben Noach and Goldberg (AACL 2020, section 3.2): see ``distillation.losses``.

    >>> import copy
    >>> from bert_decomp import DecompositionConfig, decompose_
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    >>> teacher = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> tokenizer = PreTrainedTokenizerFast(
    ...     tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")
    >>> train_dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 1], [1, 1]]})
    >>> student = copy.deepcopy(teacher)
    >>> plan = decompose_(student, DecompositionConfig("svd", rank=4), progress=False)
    >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=1, use_cpu=True, disable_tqdm=True,
    ...     report_to="none", save_strategy="no", logging_strategy="no")
    >>> log = distil(student, teacher, train_dataset, tokenizer, arguments)  # doctest: +ELLIPSIS
    {...
    >>> log[-1]["step"]
    1

    Args:
        student: what ``decompose_`` made of a copy of the teacher; on return it is in evaluation mode.
        teacher: the dense model; unchanged.
        train_dataset: encoded examples, rows of ``input_ids`` and whatever else the tokenizer makes, with ``labels`` or
            without.
        tokenizer: it pads the batches.
        arguments: of the training. With them an interrupted training continues from the last checkpoint in their
            ``output_dir``. None trains two epochs at a learning rate of 1e-4, and keeps no checkpoint.
        distillation: the terms. None takes the paper's, without the labels' term where there are no labels.
        eval_dataset: as ``train_dataset``, with labels, for evaluation during the training if ``arguments`` ask for it.
        callbacks: more of transformers' callbacks.

    Returns:
        ``Trainer``'s log history: losses by step, the mean of each term among them as ``loss_TERM``.

    Raises:
        UserError: student and teacher do not fit, a label is out of range, a term is not offered by the architecture or
            needs labels, or the loss is not a number.
    """
    for model in (student, teacher):
        refuse_fused(model, "distilled")
    kind = kind_of(student)
    if distillation is None:
        distillation = DistillationConfig()
        if not set(kind.label_columns) <= set(train_dataset.column_names):
            distillation = distillation.without_labels()
    with ExitStack() as stack:
        if arguments is None:
            arguments = TrainingArguments(
                stack.enter_context(tempfile.TemporaryDirectory()),
                num_train_epochs=2,
                learning_rate=1e-4,
                per_device_train_batch_size=32,
                warmup_steps=0.06,
                save_strategy="no",
                report_to="none",
                use_cpu=student.device.type == "cpu",
            )
        trainer = DistillationTrainer(
            student,
            arguments,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            eval_dataset=eval_dataset,
            compute_metrics=kind.metrics_in_training,
            data_collator=kind.collator(tokenizer),
            teacher=teacher,
            distillation=distillation,
            callbacks=callbacks,
        )
        stack.callback(trainer.close)
        fit(trainer)
    student.eval()
    return trainer.state.log_history
