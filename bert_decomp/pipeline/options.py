"""The command line's options: dataclasses whose help texts make ``--help``, named as in transformers' examples."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..config import RENAMED, DecompositionConfig, refuse_renamed
from ..data.demo import MINILM, cache_folder
from ..distillation.losses import FEATURE_TERMS, PRESETS, DistillationConfig, parse_terms
from ..errors import UserError
from ..io.json import parse_json, read_text

# Bytes of a file of options.
OPTIONS_LIMIT = 2**20


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field whose help text is what ``--help`` prints."""
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class ModelArguments:
    """Which model, and how its teacher is made."""

    model_name_or_path: str = option(
        MINILM,
        "Fine-tuned classifier (used as the teacher as it is) or pre-trained encoder (fine-tuned on the task "
        "first): a folder, an embedded encoder (all-MiniLM-L6-v2, all-mpnet-base-v2) or a cached hub name.",
    )
    teacher_num_train_epochs: float = option(4.0, "Epochs of fine-tuning the teacher.")
    teacher_learning_rate: float = option(1e-4, "Peak learning rate of fine-tuning the teacher.")
    cache_dir: str | None = option(
        None,
        "Where fine-tuned teachers are kept for later runs "
        "(default: $BERT_DECOMP_CACHE or ~/.cache/bert_decomp).",
    )

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else cache_folder()


@dataclass
class DataArguments:
    """Which labelled text."""

    task_name: str | None = option(
        None,
        "An embedded task: questions (the default without --train_file) or movies; or one "
        "of GLUE: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.",
    )
    data_dir: str | None = option(
        None,
        "Folder with the files of a GLUE task, laid out as the hub's nyu-mll/glue "
        "(default: the hub's cache).",
    )
    train_file: str | None = option(
        None,
        "Your own training examples: CSV, TSV, JSON-lines or Parquet; without labels "
        "if the teacher is fine-tuned and --validation_file has them.",
    )
    validation_file: str | None = option(
        None, "Your own evaluation examples (default: a tenth of --train_file)."
    )
    text_column_names: str | None = option(
        None,
        "One or two text columns, comma-separated "
        "(default: the first text columns besides the label's).",
    )
    label_column_name: str = option(
        "label", "The label's column; float labels make a regression task."
    )
    max_seq_length: int = option(128, "Longest input in tokens; longer ones are cut.")
    max_train_samples: int | None = option(None, "Use only that many first training examples.")
    max_eval_samples: int | None = option(None, "Use only that many first evaluation examples.")


@dataclass
class DistillationArguments:
    """What the student learns from its teacher."""

    distillation_preset: str = option(
        "paper",
        "Set of distillation terms: paper (all of the paper's features), light "
        "(hidden states and logits, for any architecture) or best.",
        choices=sorted(PRESETS),
    )
    distillation_terms: str | None = option(
        None,
        "Terms and weights instead of a preset's: hidden=1,logits=0.5. A weight may run in a straight line over the "
        "training (logits=0.5..1) and be shared among layers as @uniform, @linear or @last (hidden=1@linear).",
    )
    distillation_temperature: float | None = option(
        None, "Temperature of the logits term (default: the preset's; 1 with --distillation_terms)."
    )
    distillation_dropout: bool = option(False, "Keep the student's dropout while distilling.")
    cache_teacher_logits: bool = option(
        False,
        "Run the teacher once over the training examples instead of at every step; "
        "only where logits and task are the only terms.",
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop the distillation after that many evaluations without a better --metric_for_best_model.",
    )

    def config(self, labelled: bool = True) -> DistillationConfig:
        """The terms asked for; of a preset's, those that examples with or without labels can serve.

        Raises:
            UserError: a malformed or unknown term, or one that needs labels where there are none.
        """
        chosen = PRESETS[self.distillation_preset]
        if self.distillation_terms is not None:
            chosen = DistillationConfig(parse_terms(self.distillation_terms))
        terms = dict(chosen.terms)
        if not labelled and "task" in terms:
            if self.distillation_terms is not None:
                raise UserError(
                    "the term 'task' needs labelled examples; drop it from --distillation_terms or give labels"
                )
            del terms["task"]
        temperature = (
            chosen.temperature
            if self.distillation_temperature is None
            else self.distillation_temperature
        )
        config = DistillationConfig(terms, temperature, self.distillation_dropout)
        if self.cache_teacher_logits and config.features:
            raise UserError(
                "--cache_teacher_logits works with the terms logits and task alone, but the teacher must run "
                f"for {next(name for name in config.terms if name in FEATURE_TERMS)}; drop one or the other"
            )
        return config


@dataclass
class RunArguments:
    """The run as a whole."""

    fused: bool = option(
        False,
        "Measure the fused operators as well (on a machine without a GPU they run through "
        "their CPU path; one line says which backend runs and why).",
    )
    calibration_samples: int = option(
        2000, "Training examples from which the input statistics are collected."
    )
    calibration_batch_size: int = option(64, "Examples a batch in calibration and evaluation.")
    statistics_layers: int | None = option(
        None,
        "Encoder layers whose statistics are held in memory at once, with a pass over the calibration examples for each "
        "such run of layers (default: as many as fit into 1 GB).",
    )
    measure_batch_sizes: str = option("1,8,32", "Batch sizes at which latency is measured.")
    measure_seq_length: int = option(32, "Length in tokens of the measured inputs.")
    measure_seconds: float = option(2.0, "Time for each measured model and batch size.")
    measure_threads: int = option(1, "CPU threads while measuring; ratios are steadiest with one.")
    pareto_fractions: str | None = option(
        None,
        "Shares of the encoder's weights, such as 0.75,0.5,0.25, at which the report "
        "plots the metric before training against latency (takes a decomposition each).",
    )
    overwrite_output_dir: bool = option(False, "Discard another run's results in --output_dir.")

    def batch_sizes(self) -> list[int]:
        """The batch sizes to measure.

        Raises:
            UserError: they are not positive whole numbers.
        """
        try:
            sizes = [int(size) for size in self.measure_batch_sizes.split(",")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise UserError(
                f"--measure_batch_sizes {self.measure_batch_sizes!r} is not a list like 1,8,32"
            )
        return sizes

    def pareto_shares(self) -> list[float]:
        """The shares to plot; none if not asked for.

        Raises:
            UserError: they are not numbers between 0 and 1.
        """
        try:
            shares = [float(share) for share in (self.pareto_fractions or "").split(",") if share]
        except ValueError:
            shares = [0.0]
        if not all(0 < share < 1 for share in shares):
            raise UserError(
                f"--pareto_fractions {self.pareto_fractions!r} is not a list like 0.75,0.5,0.25"
            )
        return shares


@dataclass
class RunTrainingArguments(TrainingArguments):
    """transformers' own training arguments for the distillation, with this project's defaults."""

    output_dir: str | None = option("runs/default", "Where everything that the run makes goes.")
    num_train_epochs: float = option(2.0, "Epochs of distillation.")
    learning_rate: float = option(1e-4, "Peak learning rate of the distillation.")
    per_device_train_batch_size: int = option(32, "Examples a batch and device in training.")
    per_device_eval_batch_size: int = option(64, "Examples a batch and device in evaluation.")
    warmup_steps: float = option(
        0.06, "Linear warm-up: a number of steps, or a share of them below 1."
    )
    lr_scheduler_type: str = option("linear", "Learning rate schedule.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Sampler for training: 'random', 'sequential', 'group_by_length' or 'batch_rebalance'.",
    )
    save_strategy: str = option("steps", "When a checkpoint is written: no, steps or epoch.")
    save_steps: float = option(
        100, "Steps between checkpoints, from which an interrupted run goes on."
    )
    save_total_limit: int | None = option(1, "Checkpoints kept.")
    dataloader_pin_memory: bool = option(
        torch.cuda.is_available(), "Pin host memory while loading batches."
    )
    disable_tqdm: bool = option(False, "Print no progress bars while training.")
    logging_steps: float = option(25, "Steps between logged losses.")
    report_to: str = option("none", "Trainer integration to report to, such as tensorboard.")


@dataclass
class Options:
    """Everything a run was asked to do."""

    model: ModelArguments
    data: DataArguments
    decomposition: DecompositionConfig
    distillation: DistillationArguments
    run: RunArguments
    training: RunTrainingArguments

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
        """Our own options in full, and those of transformers that were changed from its defaults, as plain values."""
        out: dict[str, Any] = {}
        for group in (self.model, self.data, self.decomposition, self.distillation, self.run):
            out.update(asdict(group))
        plain = self.training.to_dict()
        defaults = {item.name: item.default for item in fields(TrainingArguments)}
        own = set(RunTrainingArguments.__annotations__) | {"seed", "data_seed", "weight_decay"}
        for name, value in plain.items():
            if name in own or (
                name in defaults
                and isinstance(value, (int, float, str, bool))
                and value != defaults[name]
            ):
                out[name] = value
        # The rank says nothing about the result; how many processes share a batch does.
        out.pop("local_rank", None)
        if self.training.world_size > 1:
            out["world_size"] = self.training.world_size
        return json.loads(json.dumps(out, default=str))

    def identity(self) -> dict[str, Any]:
        """The options that decide the result: two runs that agree in them may share an output folder."""
        return {name: value for name, value in self.as_dict().items() if name not in self._FREE}


class _Parser(HfArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


_GROUPS = (
    ModelArguments,
    DataArguments,
    DecompositionConfig,
    DistillationArguments,
    RunArguments,
    RunTrainingArguments,
)


_NAMES = {item.name for group in _GROUPS for item in fields(group)} | set(RENAMED)
# An argument's name: the first word of a message, or one that no English word looks like.
_ARGUMENT = re.compile(r"^[a-z]\w*|(?<![\w-])[a-z]+_\w+")


def with_flags(message: str) -> str:
    """A message of the library, which names arguments, as one of the command line, which names flags.

    >>> with_flags("rank and encoder_fraction both set the size; give one")
    '--rank and --encoder_fraction both set the size; give one'
    """
    return _ARGUMENT.sub(lambda match: f"--{match[0]}" if match[0] in _NAMES else match[0], message)


def parse(argv: list[str] | None = None) -> Options:
    """Read the options from the command line, or from a YAML or JSON file given as the only argument.

    Raises:
        UserError: the file is absent, malformed or names unknown options, or options contradict each other.
        SystemExit: with code 2, for a malformed command line (after one line on standard error).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        _GROUPS,
        prog="python -m bert_decomp.run",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    try:
        if len(argv) == 1 and not argv[0].startswith("-"):
            argv = _arguments(argv[0])
        refuse_renamed(part[2:].split("=")[0] for part in argv if part.startswith("--"))
        groups = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except UserError as error:
        raise UserError(with_flags(str(error))) from error
    except (ValueError, TypeError) as error:
        reason = (
            str(error)
            .splitlines()[0]
            .replace(
                "Some specified arguments are not used by the HfArgumentParser", "unknown options"
            )
        )
        raise UserError(f"{reason}; --help lists the options") from error
    options = Options(*groups)
    if options.data.task_name is None and options.data.train_file is None:
        options.data.task_name = "questions"
    if options.data.task_name is not None and options.data.train_file is not None:
        raise UserError("--task_name and --train_file name two sources of text; give one")
    if options.data.data_dir is not None and options.data.train_file is not None:
        raise UserError(
            "--data_dir is for GLUE's tasks; --train_file names a file by its whole path"
        )
    if options.data.validation_file is not None and options.data.train_file is None:
        raise UserError("--validation_file needs --train_file")
    _check_bounds(options)
    if options.run.pareto_shares() and options.decomposition.allocation == "sensitivity":
        raise UserError(
            "--pareto_fractions plans each size anew, which --allocation sensitivity makes slow; use waterfill"
        )
    options.distillation.config()
    _check_training(options)
    return options


# The smallest and the largest value of numbers that no part of the program looks at before hours have passed.
_BOUNDS = {
    "calibration_samples": (1, 2**31),
    "calibration_batch_size": (1, 2**20),
    "measure_seq_length": (1, 2**20),
    "measure_seconds": (1e-3, 1e6),
    "measure_threads": (1, 4096),
    "teacher_num_train_epochs": (0, 1e6),
    "teacher_learning_rate": (0, 1e3),
    "num_train_epochs": (0, 1e6),
    "learning_rate": (0, 1e3),
    "per_device_train_batch_size": (1, 2**20),
    "per_device_eval_batch_size": (1, 2**20),
    "seed": (0, 2**32 - 1),
    "max_seq_length": (3, 2**20),
    "statistics_layers": (1, 2**20),
}


def _check_bounds(options: Options) -> None:
    for group in (options.model, options.data, options.run, options.training):
        for name, (smallest, largest) in _BOUNDS.items():
            value = getattr(group, name, smallest)
            if value is not None and not smallest <= value <= largest:
                raise UserError(
                    f"--{name} is {value}; it must be at least {smallest} and at most {largest:g}"
                )
    if max(options.run.batch_sizes()) > 2**20:
        raise UserError(
            f"--measure_batch_sizes {options.run.measure_batch_sizes} has an absurdly large one"
        )


def _check_training(options: Options) -> None:
    training, patience = options.training, options.distillation.early_stopping_patience
    if patience is not None and (patience < 1 or not training.load_best_model_at_end):
        raise UserError(
            "--early_stopping_patience needs a number of at least 1, --load_best_model_at_end true and an "
            "--eval_strategy"
        )
    absent = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if absent:
        raise UserError(
            f"--report_to {absent[0]} names nothing that is installed; pip install {absent[0]}, or leave it out"
        )


def _arguments(path: str) -> list[str]:
    """What a file of options says, as a command line says it: there each option's type is checked.

    Raises:
        UserError: the file is absent, malformed, or has values that no option has.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{path}: give options as --name value, or one .json, .yaml or .yml file")
    text = read_text(path, OPTIONS_LIMIT)
    try:
        values = (
            parse_json(text, path) if suffix == ".json" else _YamlLoader(text).get_single_data()
        )
    except UserError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is malformed: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold option names and values")
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in _argument(path, name, value)
    ]


def _argument(path: str, name: Any, value: Any) -> list[str]:
    if isinstance(value, dict):
        entries = [*value, *value.values()]
    else:
        entries = value if isinstance(value, list) else [value]
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or not all(
            isinstance(entry, (str, int, float)) and _SAYABLE.fullmatch(str(entry))
            for entry in entries
        )
    ):
        raise UserError(
            f"{path} has {str(name)[:60]!r} with something else than a number, a text, true, false or a "
            "list of them"
        )
    if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
        raise UserError(f"{path} has {name} with a number that is not finite")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


# Text that can stand on a command line: no NUL, no half of a surrogate pair.
_SAYABLE = re.compile("[^\0\ud800-\udfff]*")


class _YamlLoader(yaml.SafeLoader):
    """Plain values only, no key twice, and no aliases, by which a short text becomes an endless one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not for options")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(names):
            raise yaml.YAMLError("a name stands twice")
        return super().construct_mapping(node, deep)
