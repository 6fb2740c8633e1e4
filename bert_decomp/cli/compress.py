"""``lowrank-bert compress``: decompose, distil, evaluate, measure and report, in one resumable job."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RENAMED, SIZES, DecompositionConfig, refuse_renamed
from ..errors import UserError
from ..extras import require
from ..pipeline.options import (
    DataArguments,
    DistillationArguments,
    MeasureArguments,
    ModelArguments,
    Options,
    RunArguments,
    TrainingDefaults,
)
from .parser import Parser, flags_in_messages, refuse_unknown

if TYPE_CHECKING:
    from transformers import HfArgumentParser

PROG = "lowrank-bert compress"
_OWN = (
    ModelArguments,
    DataArguments,
    DecompositionConfig,
    DistillationArguments,
    RunArguments,
    MeasureArguments,
)
_SIZE_FIELDS = {*SIZES, "embedding_rank"}
# What --help shows; --help-all shows every option of this project.
_COMMON = {
    "model_name_or_path",
    "task_name",
    "train_file",
    "validation_file",
    "text_column_names",
    "label_column_name",
    "problem_type",
    "max_seq_length",
    *SIZES,
    "method",
    "units",
    "latency_engine",
    "distillation_preset",
    "distillation_terms",
    "fused",
    "calibration_samples",
    "measure_batch_sizes",
    "measure_seq_length",
    "output_dir",
    "overwrite_output_dir",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "seed",
}
# Titles of --help: which of whose fields stand below.
_SECTIONS: tuple[tuple[str, type, set[str] | None], ...] = (
    ("model", ModelArguments, None),
    ("text", DataArguments, None),
    (
        "size (give one; default: encoder_fraction 0.4785, the paper's)",
        DecompositionConfig,
        _SIZE_FIELDS,
    ),
    (
        "decomposition",
        DecompositionConfig,
        {item.name for item in fields(DecompositionConfig)} - _SIZE_FIELDS,
    ),
    ("distillation", DistillationArguments, None),
    ("run", RunArguments, None),
    ("measuring", MeasureArguments, None),
    ("training", TrainingDefaults, None),
)
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


def help_text(every: bool = False) -> str:
    """What ``--help`` prints, or for ``every`` option ``--help-all``, made from the dataclasses alone."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} [options], or {PROG} options.yaml",
        description="Decompose a fine-tuned BERT-family encoder, distil, evaluate and measure it, and write a report.",
        epilog=("" if every else "--help-all lists all options, and ")
        + "--help-training those of transformers' training.",
        add_help=False,
    )
    for title, group, names in _SECTIONS:
        section = parser.add_argument_group(title)
        for item in fields(group):
            if (names is None or item.name in names) and (every or item.name in _COMMON):
                text = item.metadata["help"].replace("%", "%%")
                if item.default not in (None, False) and "default" not in text:
                    text = f"{text.removesuffix('.')} (default: {item.default})."
                section.add_argument(f"--{item.name}", help=text, **_metavar(str(item.type)))
    return parser.format_help()


def _metavar(type_name: str) -> dict[str, Any]:
    """argparse's settings for the placeholder of an option's value."""
    if type_name.startswith("bool"):
        return {"action": "store_true"}
    for start, letter in (
        ("int", "N"),
        ("float", "X"),
        ("list[float", "X ..."),
        ("list", "PATTERN ..."),
    ):
        if type_name.startswith(start):
            return {"metavar": letter}
    return {"metavar": "TEXT"}


def _full_parser() -> HfArgumentParser:
    """The parser of this project's options and of all of transformers' training options."""
    from transformers import HfArgumentParser

    from ..pipeline.training import RunTrainingArguments

    class FullParser(HfArgumentParser):
        error = Parser.error

    return FullParser((*_OWN, RunTrainingArguments), prog=PROG, allow_abbrev=False)


def _training_help() -> str:
    from argparse import ArgumentDefaultsHelpFormatter

    from transformers import HfArgumentParser

    from ..pipeline.training import RunTrainingArguments

    return HfArgumentParser(
        RunTrainingArguments, prog=PROG, formatter_class=ArgumentDefaultsHelpFormatter
    ).format_help()


def parse(argv: list[str]) -> Options:
    """Read the options from a command line, or from a YAML or JSON file given as the only argument.

    Raises:
        UserError: the line or file is malformed or names unknown options, or options contradict each other.
    """
    names = {item.name for group in _OWN for item in fields(group)} | set(RENAMED)
    names |= {item.name for item in fields(TrainingDefaults)}
    with flags_in_messages(names):
        if len(argv) == 1 and not argv[0].startswith("-"):
            from .option_file import read_option_file

            argv = read_option_file(argv[0])
        refuse_renamed(
            part[2:].partition("=")[0].replace("-", "_") for part in argv if part.startswith("--")
        )
        parser = _full_parser()
        try:
            *groups, rest = parse_known(parser, argv)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"{str(error).splitlines()[0]}; --help lists the options") from error
        refuse_unknown(rest, parser._option_string_actions)
        options = Options(*groups)
        _check(options)
    return options


def parse_known(parser: HfArgumentParser, argv: list[str]) -> tuple[Any, ...]:
    """The dataclasses that ``argv`` fills, and what is left over."""
    return parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )


def _check(options: Options) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    data = options.data
    if data.task_name is None and data.train_file is None:
        data.task_name = "questions"
    if data.task_name is not None and data.train_file is not None:
        raise UserError("task_name and train_file name two sources of text; give one")
    if data.data_dir is not None and data.train_file is not None:
        raise UserError("data_dir is for GLUE's tasks; train_file names a file by its whole path")
    if data.validation_file is not None and data.train_file is None:
        raise UserError("validation_file needs train_file")
    for group in vars(options).values():
        for name, (smallest, largest) in _BOUNDS.items() if is_dataclass(group) else ():
            value = getattr(group, name, None)
            if value is not None and not smallest <= value <= largest:
                raise UserError(
                    f"{name} is {value}; it must be at least {smallest} and at most {largest:g}"
                )
    options.measure.batch_sizes()
    if options.measure.fractions() and options.decomposition.allocation == "sensitivity":
        raise UserError(
            "pareto_fractions plans each size again, which the allocation sensitivity makes slow; use waterfill"
        )
    options.distillation.config()
    _check_training(options)


def _check_training(options: Options) -> None:
    from transformers.integrations import get_available_reporting_integrations

    training, patience = options.training, options.distillation.early_stopping_patience
    if patience is not None and (patience < 1 or not training.load_best_model_at_end):
        raise UserError(
            "early_stopping_patience needs a number of at least 1, load_best_model_at_end true and an eval_strategy"
        )
    absent = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if absent:
        raise UserError(
            f"report_to {absent[0]} names nothing that is installed; pip install {absent[0]}, or leave it out"
        )


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    if {"--help-all", "--help_all"} & set(argv):
        print(help_text(every=True))
        return
    require("bert")
    require("report")
    if {"--help-training", "--help_training"} & set(argv):
        print(_training_help())
        return

    import logging

    import torch
    from accelerate.utils import patch_environment

    from ..pipeline.run import run
    from .command import quiet_libraries

    quiet_libraries()
    torch.set_float32_matmul_precision("highest")
    options = parse(argv)
    if options.training.process_index:
        logging.getLogger("bert_decomp").setLevel(logging.WARNING)
    # Beside the checkpoints, which are deleted at the end, and for this run alone.
    events = os.environ.get(
        "TENSORBOARD_LOGGING_DIR", Path(options.training.output_dir) / "tensorboard"
    )
    with (
        flags_in_messages(options.as_dict()),
        patch_environment(TENSORBOARD_LOGGING_DIR=events),
    ):
        run(options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
