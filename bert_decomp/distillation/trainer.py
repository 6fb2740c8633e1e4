"""Feature distillation: the dense teacher shows its low-rank copy what every part of each layer should compute.

``terms.py`` says what is compared, ``features.py`` how it is recorded; here ``transformers.Trainer`` gets the loss.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..kinds import kind_of, model_inputs
from ..models.architectures import FAMILIES
from ..models.nested import fractions_of, use_size_
from ..models.nested_resized import NestedResized
from ..models.resized import RESIZED
from .counterparts import Counterparts
from .features import FeatureCapture, Features, Masks
from .losses import DistillationConfig
from .resumable import ResumableTrainer
from .terms import FEATURE_TERMS, Shares, Sizes, feature_losses, feature_sizes

logger = logging.getLogger("bert_decomp")


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise a UserError unless student and teacher have the same widths, depth and vocabulary."""
    for name in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_labels",
    ):
        of_student, of_teacher = (getattr(model.config, name, None) for model in (student, teacher))
        if of_student != of_teacher:
            raise UserError(
                f"student and teacher differ in {name}: {of_student} and {of_teacher}; "
                "distil a model from the one it was factored from"
            )


def _without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in names}


class DistillationTrainer(ResumableTrainer):
    """``transformers.Trainer`` whose loss is feature distillation from a frozen dense teacher.

    Every argument of ``Trainer`` works as usual. Batches without labels are allowed if no ``task`` term is asked for.
    Examples that bring ``teacher_logits`` spare the teacher, if no term reads its features. A nested student learns all
    of its sizes from every batch: the loss is their mean, of one pass of the teacher.

    >>> import copy, tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
    >>> teacher = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> trainer = DistillationTrainer(copy.deepcopy(teacher), TrainingArguments(tempfile.mkdtemp(), use_cpu=True),
    ...     teacher=teacher, distillation=DistillationConfig({"hidden": 1.0, "logits": 1.0}))
    >>> batch = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5).long()}
    >>> round(trainer.compute_loss(trainer.model, batch).item(), 6)  # of a copy of the teacher
    0.0
    >>> trainer.close()

    Args:
        teacher: the dense model, of the same shape as ``model``. It is set to evaluation mode and never
            changed: it runs without gradients.
        distillation: the terms.

    Raises:
        UserError: teacher and student do not fit, a label is out of range, or a term is not offered by the
        architecture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        teacher: PreTrainedModel,
        distillation: DistillationConfig,
        **kwargs: Any,
    ):
        check_pair(model, teacher)
        resized = any(isinstance(part, (*RESIZED, NestedResized)) for part in model.modules())
        if distillation.terms_without_counterpart and resized:
            raise UserError(
                f"the student has other heads than its teacher; drop the terms that need the same: "
                f"{', '.join(distillation.terms_without_counterpart)}"
            )
        super().__init__(model, *args, **kwargs)
        self.kind = kind_of(model)
        self.kind.check_examples(model, self.train_dataset)
        self.distillation = distillation
        if distillation.features and model.config.model_type not in FAMILIES:
            logger.info(
                "distil: %s has no row in bert_decomp/models/architectures.py; its layers' outputs and its logits are "
                "what is compared",
                model.config.model_type,
            )
        # Of a model of one size there is None. The largest comes last, and stays in use.
        self._fractions: tuple[float | None, ...] = fractions_of(model)[::-1] or (None,)
        self.teacher = teacher.to(self.args.device).eval()
        self._dropouts = [
            (module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)
        ]
        if not distillation.dropout:
            for module, _ in self._dropouts:
                module.p = 0.0
        self._counterparts: dict[float | None, Counterparts] = {}
        for fraction in self._fractions:
            if fraction is not None:
                use_size_(model, fraction)
            self._counterparts[fraction] = Counterparts(model, teacher, distillation.features)
        self._of_student = FeatureCapture(model, distillation.features)
        self._of_teacher = FeatureCapture(teacher, distillation.features)
        self._shares = {
            fraction: self._layer_shares(counterparts)
            for fraction, counterparts in self._counterparts.items()
        }
        # The teacher's features and answers of the slices that the student has not seen yet.
        self._ahead: deque[tuple[Features, Masks, Tensor | None]] = deque()
        # Rows of answers of the whole batch, and the terms' sizes by fraction.
        self._rows = 0
        self._sizes: dict[float | None, Sizes] = {}
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0.0

    def _layer_shares(self, counterparts: Counterparts) -> Shares:
        """Each layer's share of each term on features, where the student has something of them."""
        shares: dict[str, dict[int, float]] = {}
        for name in (name for name in self.distillation.weights if name in FEATURE_TERMS):
            weights = self.distillation.weights[name].of_layers(len(self._of_teacher.layers))
            feature = FEATURE_TERMS[name].feature
            of_layers = {
                layer: weight
                for layer, weight in weights.items()
                if (feature, layer) not in counterparts.absent
            }
            if of_layers:
                shares[name] = of_layers
        return shares

    def close(self) -> None:
        """Remove the hooks from both models and give the student back its dropout."""
        for module, probability in self._dropouts:
            module.p = probability
        self._of_student.close()
        self._of_teacher.close()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "teacher_logits" not in self._signature_columns:
            self._signature_columns.append("teacher_logits")

    def _look_ahead(self, parts: list[dict[str, Any]]) -> None:
        """Run the teacher over the slices of a batch. Each term's size is the whole batch's, so all come first."""
        self._ahead.clear()
        for part in parts:
            answers, part = part.get("teacher_logits"), _without(part, "teacher_logits")
            if self.distillation.needs_teacher and (answers is None or self.distillation.features):
                with torch.no_grad(), self.accelerator.autocast():
                    answers = self.kind.answers(self.teacher(**model_inputs(part)), part)
            mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
            self._ahead.append((self._of_teacher.take(), Masks(mask, self.teacher.config), answers))
        self._rows = sum(len(answers) for _, _, answers in self._ahead if answers is not None)
        slices = [(features, masks) for features, masks, _ in self._ahead]
        for fraction, counterparts in self._counterparts.items():
            mapped = [(counterparts.of(features), masks) for features, masks in slices]
            self._sizes[fraction] = feature_sizes(mapped, self._shares[fraction])
        for features, _ in slices:
            features.forget_scores()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if model.training and not self._ahead:
            self._look_ahead([inputs])
        inputs = _without(inputs, "teacher_logits")
        if not model.training:
            # Evaluation wants the model's own loss; the teacher need not run.
            outputs, answers, loss = self._run(model, inputs)
            self._of_student.take()
            loss = answers.new_zeros(()) if loss is None else loss
            return (loss, outputs) if return_outputs else loss
        ahead, losses = self._ahead.popleft(), []
        for fraction in self._fractions:
            if fraction is not None:
                use_size_(model, fraction)
            outputs, answers, task_loss = self._run(model, inputs)
            losses.append(self._loss(inputs, answers, task_loss, ahead, fraction))
        loss = torch.stack(losses).mean()
        return (loss, outputs) if return_outputs else loss

    def _run(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[Any, Tensor, Tensor | None]:
        """The model's outputs, its answers, and its loss against the labels if there are any."""
        outputs = model(**_without(inputs, "group"))
        return outputs, self.kind.answers(outputs, inputs), self.kind.task_loss(outputs, inputs)

    def _loss(
        self,
        inputs: dict[str, Tensor],
        answers: Tensor,
        task_loss: Tensor | None,
        ahead: tuple[Features, Masks, Tensor | None],
        fraction: float | None,
    ) -> Tensor:
        """Of the student's last pass, at the size in use."""
        teacher, masks, known = ahead
        counterparts, weights = self._counterparts[fraction], self.distillation.weights
        values = feature_losses(
            self._of_student.take(),
            counterparts.of(teacher),
            masks,
            self._shares[fraction],
            self._sizes[fraction],
        )
        if "logits" in weights and known is not None:
            share = len(known) / self._rows
            values["logits"] = share * self.kind.compare_batch(
                answers.float(), known.float(), self.distillation.temperature, inputs
            )
        if "task" in weights:
            if task_loss is None:
                raise UserError("the term 'task' needs labelled examples; drop it or give labels")
            values["task"] = self._share * task_loss
        # Schedules follow from the step alone, so a resumed run takes them up where they were.
        progress = self.state.global_step / max(self.state.max_steps, 1)
        loss = sum(
            (weights[name].at(progress) * value for name, value in values.items()),
            start=answers.new_zeros(()),
        )
        self._note_terms(values, loss)
        if self.args.world_size > 1 and not {"logits", "task"} & set(weights):
            # Processes that share gradients wait for those of every parameter in the output, the head's too.
            loss = loss + 0.0 * answers.sum()
        return loss

    def _note_terms(self, values: dict[str, Tensor], loss: Tensor) -> None:
        if not torch.isfinite(loss):
            bad = next(
                (name for name, value in values.items() if not torch.isfinite(value)), "the sum"
            )
            raise UserError(
                f"the loss is not a number at step {self.state.global_step}, term {bad}; lower "
                "learning_rate (the last checkpoint is kept)"
            )
        for name, value in values.items():
            self._term_sums[name] = (
                self._term_sums.get(name, torch.zeros_like(value)) + value.detach()
            )
        self._term_steps += self._share

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add each term's mean since the last log, unweighted, to what Trainer logs."""
        if "loss" in logs and self._term_steps:
            sums = self.accelerator.reduce(
                torch.stack(list(self._term_sums.values())), reduction="mean"
            )
            logs = {
                **logs,
                **{
                    f"loss_{name}": total / self._term_steps
                    for name, total in zip(self._term_sums, sums.tolist(), strict=True)
                },
            }
            self._term_sums, self._term_steps = {}, 0.0
        super().log(logs, *args, **kwargs)
