"""``Kind``: what differs from one kind of task to the next, stage by stage. The defaults are a text classifier's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.batches import encode
from ..data.columns import unlabelled_columns
from ..data.files import ReadOptions, load_files, load_labelled
from ..data.model_labels import PROBLEM_TYPES

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.schema import Reading
    from ..data.table import Table
    from ..data.task import Task

# What examples bring beside the inputs of a model.
NOT_INPUTS = frozenset(
    {"labels", "pair", "score", "word", "query", "start_positions", "end_positions"}
    | {"question", "first", "last", "text", "accepted", "group"}
)


def model_inputs(batch: Mapping[str, Tensor], device: Any = None) -> dict[str, Tensor]:
    """The entries of a batch that a model takes, on ``device`` if one is given.

    >>> sorted(model_inputs({"input_ids": torch.ones(1, 2), "labels": torch.ones(1)}))
    ['input_ids']
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    return inputs if device is None else {name: value.to(device) for name, value in inputs.items()}


class Kind:
    """A kind of task.

    What a model says of a batch are its *answers*, (rows, numbers): one row an example or, where every token has an
    answer, one row a token. The *truth* of a batch has as many rows.

    Attributes:
        name: as ``problem_type`` gives it.
        problem_type: transformers' word for the config of a model, which decides its loss; None if it has none.
        auto: the auto class that loads its models, or a model's own class.
        head: how the names of their classes end.
        outputs: the model's outputs that an exported model gives.
        label_columns: what encoded examples with labels bring for the model's loss.
        labelled: whether models have classes or scores of their own, which a file's labels must fit.
        pipeline_tag: what the hub calls the task.
        own_loss: whether ``task_loss`` is another than the model's.
        row_per_example: whether an example has one row of answers.
        evaluates_in_training: whether ``Trainer`` can evaluate while it trains.
        windowed: whether its answers are places in texts, so that long ones go through the model in windows.
        recipe: of the fine-tuning of a teacher; raised when that changes, so that teachers of the old one are not taken
            from the cache.
    """

    name = ""
    problem_type: str | None = None
    auto: Any = AutoModelForSequenceClassification
    head = "ForSequenceClassification"
    outputs: tuple[str, ...] = ("logits",)
    label_columns: tuple[str, ...] = ("labels",)
    labelled = True
    evaluates_in_training = True
    row_per_example = True
    own_loss = False
    pipeline_tag = "text-classification"
    windowed = False
    recipe = 1

    def has_head(self, config: Any, class_name: str | None = None) -> bool:
        """Whether a checkpoint (or the class of a model) has the head of this kind."""
        names = [class_name] if class_name is not None else config.architectures or []
        return any(name.endswith(self.head) for name in names)

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        """Whether a checkpoint (or a model of that class) was trained for this kind."""
        return self.has_head(config, class_name)

    def bound(self, config: Any) -> Kind:
        """This kind with what a model's config says of it."""
        return self

    def loaded(self, folder: str | Path, config: Any) -> Kind:
        """This kind with what the files beside a model say of it; what is returned goes with the model."""
        return self

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the files beside a model that other libraries read."""

    def head_config(self, task: Task) -> dict[str, Any]:
        """What the config of a new head for ``task`` says."""
        labels: dict[str, Any] = {"num_labels": task.num_outputs}
        if task.label_names is not None:
            labels["id2label"] = dict(enumerate(task.label_names))
            labels["label2id"] = {name: index for index, name in enumerate(task.label_names)}
        return labels

    # Data

    def read(self, train_file: str, validation_file: str | None, options: ReadOptions) -> Task:
        """The user's files as a task; see ``data.files.load_files``."""
        own = self.name not in PROBLEM_TYPES
        task = load_files(
            train_file,
            validation_file,
            options.text_columns,
            options.label_column,
            options.model,
            self.problem_type if own else options.problem_type,
        )
        return replace(task, kind=self.name) if own else task

    def read_held_out(self, path: str, options: ReadOptions) -> tuple[Dataset, Reading]:
        """One file, labels numbered as a model numbers them; see ``data.files.load_labelled``."""
        assert options.model is not None
        return load_labelled(path, options.model, options.text_columns, options.label_column)

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        """Texts as token ids; see ``data.batches.encode``."""
        return encode(data, tokenizer, max_seq_length)

    def limit(self, max_seq_length: int) -> int:
        """Tokens to which texts are cut, where the kind knows of fewer."""
        return max_seq_length

    def with_reference(
        self, data: Dataset, teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
    ) -> Dataset:
        """Held-out examples with what only the teacher can say of them.

        Args:
            batches: of ``data``, in the order of ``data.batches.length_order``.
        """
        return data

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What makes a padded batch of encoded examples."""
        return DataCollatorWithPadding(tokenizer)

    def start_(self, model: PreTrainedModel, train: Dataset) -> None:
        """Give the new head of a model a better start than a random one, from encoded examples."""

    def settle_(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> None:
        """Write into a trained model's config what follows from labelled training examples."""

    def check_examples(self, model: PreTrainedModel, examples: Any) -> None:
        """Raise a UserError if a training example's label cannot be the model's."""

    # Texts without labels

    def text_columns(self, table: Table, names: Sequence[str] | None) -> tuple[str, ...]:
        """The columns of a file without labels that hold the texts, those that the user names if any.

        Raises:
            UserError: there are none, or it is not clear which.
        """
        return unlabelled_columns(table, names)

    def windows(
        self, texts: Sequence[Sequence[Any]], tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> tuple[dict[str, list[Any]], Any]:
        """Columns of texts as windows of at most ``longest`` tokens: what the model takes, a row a window, and what
        ``found`` must know of them. Only where ``windowed``."""
        raise NotImplementedError

    def found(
        self, outputs: Sequence[np.ndarray], places: Any, texts: Sequence[Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """What a model's outputs (tokens, numbers) of all windows say, a dict of plain values for each text. Only where
        ``windowed``."""
        raise NotImplementedError

    # Answers and losses

    def answers(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The answers (rows, numbers) in what a model gave for a batch."""
        return outputs.logits

    def raw(self, outputs: Any) -> Tensor:
        """What an exported model gives, as one tensor; several outputs stand side by side in its last dimension."""
        parts = [outputs[name] for name in self.outputs]
        return parts[0] if len(parts) == 1 else torch.stack(parts, -1)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Answers, or a part of the truth, of several batches."""
        return torch.cat(list(parts))

    def truth(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``metrics`` compares the answers of a batch with, by name; each with a row for a row of answers."""
        return {"labels": batch["labels"]}

    @torch.inference_mode()
    def predict(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Tensor]],
        progress: bool = True,
        title: str = "predict",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A model's answers (rows, numbers), float32, and their truth by name, of padded batches with labels, on the
        CPU."""
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        answers, truth = [], []
        for batch in tqdm(batches, desc=title, unit="batch", disable=not progress, leave=False):
            inputs = model_inputs(batch, device)
            answers.append(self.answers(model(**inputs), inputs).float().cpu())
            truth.append(self.truth(batch))
        model.train(was_training)
        names = truth[0] if truth else {}
        return self.joined(answers), {
            name: self.joined([part[name] for part in truth]) for name in names
        }

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """A label-free loss summed over rows, whose mean outer gradient is the Fisher information of the answers."""
        raise NotImplementedError

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The term ``logits`` of the distillation: how far a student's answers are from its teacher's."""
        raise NotImplementedError

    def compare_batch(
        self, student: Tensor, teacher: Tensor, temperature: float, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """``compare`` of the answers to a batch, for a kind that must know of their rows what the batch says."""
        return self.compare(student, teacher, temperature)

    def task_loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """The loss of a model against the labels, or None without them."""
        return getattr(outputs, "loss", None)

    def decisions(self, answers: Tensor) -> Tensor | None:
        """What answers (rows, numbers) decide, a row each; None where nothing is decided."""
        return answers.argmax(-1)

    # Metrics

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """Metrics of all answers, the one called ``leading`` first if there is such a one. Shares of 1, not percent."""
        raise NotImplementedError

    def metric_names(self, task: Task) -> tuple[str, ...]:
        """The metrics that the validation examples of ``task`` can give."""
        labels = np.array(task.validation["label"])
        return tuple(self.metrics(np.zeros((len(labels), task.num_outputs)), {"labels": labels}))

    def metrics_in_training(self, found: Any) -> dict[str, float]:
        """Metrics of what ``Trainer`` gathers while it evaluates (``predictions``, ``label_ids``)."""
        return self.metrics(found.predictions, {"labels": found.label_ids})


def random_signs(answers: Tensor, generator: torch.Generator) -> Tensor:
    """1 or -1 for each number of ``answers``, drawn by ``generator``."""
    signs = torch.randint(0, 2, answers.shape, generator=generator) * 2 - 1
    return signs.to(answers.device)


def drawn_cross_entropy(answers: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Cross-entropy of logits (rows, classes) against classes drawn from softmax(answers / temperature), summed."""
    scaled = answers / temperature
    drawn = torch.multinomial(scaled.detach().softmax(-1).cpu(), 1, generator=generator)
    return -scaled.log_softmax(-1).gather(-1, drawn.to(answers.device)).sum()


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over the last dimension at a temperature, times its square, summed and divided by the
    rows (Hinton et al., 2015)."""
    of_student, of_teacher = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    divergence = F.kl_div(of_student, of_teacher, log_target=True, reduction="batchmean")
    return divergence * temperature**2


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last dimension."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(-1, keepdims=True)


def leading_first(metrics: dict[str, float], leading: str | None) -> dict[str, float]:
    """The same metrics with ``leading`` first, if it is one of them."""
    return {leading: metrics[leading], **metrics} if leading in metrics else metrics
