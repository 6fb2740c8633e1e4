"""What the main job can be asked to do: dataclasses whose fields are the command line's options.

They are named as in transformers' examples, and their help texts make ``--help``.

Like ``config`` this module imports neither torch nor transformers, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DecompositionConfig
from ..errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..distillation.losses import DistillationConfig


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that ``--help`` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model, and how its teacher is made."""

    model_name_or_path: str = option(
        "all-MiniLM-L6-v2",
        "Classifier, or encoder to fine-tune first: a folder or a cached hub name.",
    )
    teacher_num_train_epochs: float = option(4.0, "Epochs of fine-tuning an encoder.")
    teacher_learning_rate: float = option(1e-4, "Peak learning rate of fine-tuning it.")
    cache_dir: str | None = option(
        None, "Folder of fine-tuned teachers (default: ~/.cache/bert_decomp)."
    )

    @property
    def cache(self) -> Path:
        """The folder of fine-tuned teachers."""
        from ..data.demo import cache_folder

        return Path(self.cache_dir) if self.cache_dir else cache_folder()


@dataclass
class DataArguments:
    """Which labelled text."""

    task_name: str | None = option(
        None,
        "Built in: questions, movies, sentences (for embedders); GLUE: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, "
        "wnli (default: questions).",
    )
    data_dir: str | None = option(None, "Folder of a GLUE task's files (default: the hub's cache).")
    train_file: str | None = option(
        None,
        "Training examples: CSV, TSV, JSON-lines or Parquet.",
    )
    validation_file: str | None = option(
        None, "Evaluation examples (default: a tenth of train_file)."
    )
    text_column_names: str | None = option(
        None, "One or two, comma-separated (default: found in the file)."
    )
    label_column_name: str = option(
        "label", "Column of labels; several of 0 and 1, comma-separated."
    )
    problem_type: str | None = option(
        None,
        "single_label_classification, multi_label_classification, regression, "
        "token_classification, question_answering, embedding, reranking or listwise_reranking (default: by the model "
        "and the labels).",
    )
    max_seq_length: int = option(128, "Longest input in tokens; longer ones are cut.")
    max_train_samples: int | None = option(None, "Use only the first N training examples.")
    max_eval_samples: int | None = option(None, "Use only the first N evaluation examples.")


@dataclass
class DistillationArguments:
    """What the student learns from its teacher."""

    distillation_preset: str = option(
        "paper",
        "paper (all its features), light (any architecture) or best.",
    )
    distillation_terms: str | None = option(
        None,
        "Instead of a preset: hidden=1,logits=0.5; over the training logits=0.5..1, by layer "
        "hidden=1@linear (uniform, linear, last).",
    )
    distillation_temperature: float | None = option(
        None, "Temperature of the term logits (default: the preset's, or 1)."
    )
    distillation_dropout: bool = option(False, "Keep the student's dropout.")
    cache_teacher_logits: bool = option(
        False, "Run the teacher once; for the terms logits and task."
    )
    early_stopping_patience: int | None = option(
        None, "Stop after N evaluations without a better metric_for_best_model."
    )

    def config(self, labelled: bool = True, resized: bool = False) -> DistillationConfig:
        """The terms asked for; of a preset's, those that the examples and the student can serve.

        Args:
            labelled: whether examples have labels.
            resized: whether the student has fewer or smaller heads or fewer neurons than its teacher.

        Raises:
            UserError: a malformed or unknown term or preset, or one that examples or student cannot serve.
        """
        from ..distillation.losses import PRESETS, DistillationConfig, parse_terms
        from ..distillation.terms import FEATURE_TERMS

        if self.distillation_preset not in PRESETS:
            raise UserError(
                f"unknown distillation_preset {self.distillation_preset!r}; choose one of {', '.join(PRESETS)}"
            )
        chosen = PRESETS[self.distillation_preset]
        if self.distillation_terms is not None:
            chosen = DistillationConfig(parse_terms(self.distillation_terms))
        if not labelled and "task" in chosen.terms:
            if self.distillation_terms is not None:
                raise UserError(
                    "the term 'task' needs labelled examples; drop it from distillation_terms or give labels"
                )
            chosen = chosen.without_labels()
        if resized and chosen.terms_without_counterpart:
            if self.distillation_terms is not None:
                raise UserError(
                    "heads get other sizes than the teacher's; drop the terms that need the same from "
                    f"distillation_terms: {', '.join(chosen.terms_without_counterpart)}"
                )
            chosen = chosen.of_counterparts()
        temperature = (
            chosen.temperature
            if self.distillation_temperature is None
            else self.distillation_temperature
        )
        config = replace(chosen, temperature=temperature, dropout=self.distillation_dropout)
        if self.cache_teacher_logits and config.features:
            raise UserError(
                "cache_teacher_logits works with the terms logits and task alone, but the teacher must run "
                f"for {next(name for name in config.terms if name in FEATURE_TERMS)}; drop one or the other"
            )
        return config


@dataclass
class RunArguments:
    """The run as a whole."""

    fused: bool = option(
        False,
        "Use the fused operators and the inference runtime.",
    )
    overwrite_output_dir: bool = option(False, "Discard another run's results in output_dir.")
    calibration_samples: int = option(2000, "Training examples that statistics are of.")
    calibration_batch_size: int = option(
        64, "Examples a batch in evaluation, and at most in calibration."
    )
    statistics_layers: int | None = option(
        None, "Layers of statistics in memory at once (default: an eighth of it)."
    )


@dataclass
class MeasureArguments:
    """How latency is measured."""

    measure_batch_sizes: str = option("1,8,32", "Batch sizes.")
    measure_seq_length: int = option(32, "Length in tokens.")
    measure_seconds: float = option(2.0, "Time for each model and batch size.")
    measure_threads: int = option(1, "CPU threads; ratios are steadiest with one.")
    pareto_fractions: str | None = option(
        None,
        "Encoder fractions to plot, untrained, such as 0.75,0.5,0.25.",
    )

    def batch_sizes(self) -> list[int]:
        """The batch sizes to measure.

        Raises:
            UserError: they are not positive whole numbers.
        """
        try:
            sizes = [int(size) for size in self.measure_batch_sizes.split(",")]
        except ValueError:
            sizes = []
        if not sizes or not 1 <= min(sizes) <= max(sizes) <= 2**20:
            raise UserError(
                f"measure_batch_sizes {self.measure_batch_sizes!r} is not a list like 1,8,32"
            )
        return sizes

    def fractions(self) -> list[float]:
        """The fractions to plot; none if not asked for.

        Raises:
            UserError: they are not numbers between 0 and 1.
        """
        try:
            values = [float(value) for value in (self.pareto_fractions or "").split(",") if value]
        except ValueError:
            values = [0.0]
        if not all(0 < value < 1 for value in values):
            raise UserError(
                f"pareto_fractions {self.pareto_fractions!r} is not a list like 0.75,0.5,0.25"
            )
        return values


@dataclass
class TrainingDefaults:
    """Those of transformers' training arguments that a user sets, with this project's defaults (see ``training``)."""

    output_dir: str | None = option("runs/default", "Folder for all that the run makes.")
    num_train_epochs: float = option(2.0, "Epochs of distillation.")
    learning_rate: float = option(1e-4, "Peak learning rate of the distillation.")
    per_device_train_batch_size: int = option(32, "Examples a batch and device in training.")
    per_device_eval_batch_size: int = option(64, "Examples a batch and device in evaluation.")
    warmup_steps: float = option(0.06, "Warm-up steps, or below 1 a share of them.")
    lr_scheduler_type: str = option("linear", "Learning rate schedule.")
    train_sampling_strategy: str = option(
        "group_by_length", "group_by_length, random, sequential or batch_rebalance."
    )
    seed: int = option(42, "Seed of everything random.")
    save_strategy: str = option("steps", "Checkpoints: no, steps or epoch.")
    save_steps: float = option(100, "Steps between checkpoints.")
    save_total_limit: int | None = option(1, "Checkpoints kept.")
    logging_steps: float = option(25, "Steps between logged losses.")
    report_to: str = option("none", "Where to log, such as tensorboard.")
    disable_tqdm: bool = option(False, "No progress bars in training.")


@dataclass
class Options:
    """Everything a run was asked to do."""

    model: ModelArguments
    data: DataArguments
    decomposition: DecompositionConfig
    distillation: DistillationArguments
    run: RunArguments
    measure: MeasureArguments
    training: TrainingArguments

    # Options that change where or how results are made but not what they are.
    _FREE = frozenset(
        {
            "output_dir",
            "overwrite_output_dir",
            "cache_dir",
            "logging_dir",
            "disable_tqdm",
            "report_to",
            "statistics_layers",
        }
    )

    def as_dict(self) -> dict[str, Any]:
        """This project's options in full, and those of transformers that differ from its defaults, as plain values."""
        from transformers import TrainingArguments

        result: dict[str, Any] = {}
        for group in (
            self.model,
            self.data,
            self.decomposition,
            self.distillation,
            self.run,
            self.measure,
        ):
            result.update(asdict(group))
        defaults = {item.name: item.default for item in fields(TrainingArguments)}
        own = {item.name for item in fields(TrainingDefaults)}
        own |= {"dataloader_pin_memory", "data_seed", "weight_decay"}
        for name, value in self.training.to_dict().items():
            changed = (
                name in defaults
                and isinstance(value, (int, float, str, bool))
                and value != defaults[name]
            )
            if name in own or changed:
                result[name] = value
        # The rank says nothing about the result; how many processes share a batch does.
        result.pop("local_rank", None)
        if self.training.world_size > 1:
            result["world_size"] = self.training.world_size
        return json.loads(json.dumps(result, default=str))

    def identity(self) -> dict[str, Any]:
        """The options that decide the result: two runs that agree in them may share an output folder."""
        return {name: value for name, value in self.as_dict().items() if name not in self._FREE}
