"""``lowrank-bert evaluate``: the metrics of a saved model, dense or low-rank, on a task or a labelled file."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..extras import require
from .command import quiet_libraries
from .parser import Parser, flags_in_messages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ..data.schema import Reading
    from ..kinds import Kind

logger = logging.getLogger("bert_decomp")


@dataclass(frozen=True)
class HeldOut:
    """The labelled splits that the options name, the first under an empty name, and how each was read."""

    splits: dict[str, Dataset]
    readings: dict[str, Reading]
    label_names: tuple[str, ...] | None
    leading: str | None = None


def held_out_of(options: argparse.Namespace, model: PreTrainedModel, kind: Kind) -> HeldOut:
    """Read the labelled text that the options name; the labels of a file are taken as the model's config names them.

    Raises:
        UserError: the text cannot be read, or has labels that the model lacks.
    """
    from ..data.files import ReadOptions
    from ..data.model_labels import ModelLabels
    from ..data.task import load_task
    from ..distillation.teacher import check_labels

    if options.file is None:
        task = load_task(options.task_name, options.data_dir).limited(
            None, options.max_eval_samples
        )
        check_labels(model, options.model, task)
        readings = {name: task.readings[name or "validation"] for name in ("", *task.others)}
        splits = {"": task.validation, **task.others}
        return HeldOut(splits, readings, task.label_names, task.main_metric)
    labels = ModelLabels.of(model.config, options.model) if kind.labelled else None
    columns = options.text_column_names.split(",") if options.text_column_names else None
    data, reading = kind.read_held_out(
        options.file, ReadOptions(columns, options.label_column_name, labels)
    )
    if options.max_eval_samples is not None and len(data) > options.max_eval_samples:
        reading = reading.without(len(data) - options.max_eval_samples, "beyond max_eval_samples")
        data = data.take(options.max_eval_samples)
    return HeldOut({"": data}, {"": reading}, labels.class_names if labels else None)


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    parser = Parser(prog="lowrank-bert evaluate", description=__doc__.partition(": ")[2])
    parser.add_argument("model", help="folder of a saved classifier")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task_name", help="an embedded or GLUE task")
    source.add_argument(
        "--file", help="your own labelled examples: CSV, TSV, JSON-lines or Parquet"
    )
    parser.add_argument("--data_dir", help="folder with the files of a GLUE task")
    parser.add_argument("--text_column_names", help="one or two text columns, comma-separated")
    parser.add_argument(
        "--label_column_name", default="label", help="the label's column (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="examples a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--max_seq_length",
        type=int,
        default=128,
        help="longest input in tokens; longer ones are cut (default: %(default)s)",
    )
    parser.add_argument("--max_eval_samples", type=int, help="use only that many first examples")
    parser.add_argument(
        "--teacher", help="of an embedder: the folder of the model whose vectors it follows"
    )
    parser.add_argument("--output_file", type=Path, help="write the metrics there as JSON")
    options = parser.parse_args(argv)
    for name, smallest in (("batch_size", 1), ("max_seq_length", 3), ("max_eval_samples", 1)):
        if getattr(options, name) is not None and getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least {smallest}")
    require("bert")
    quiet_libraries()
    with flags_in_messages(vars(options)):
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from ..data.batches import batches
    from ..data.describe import describe_split
    from ..evaluation.metrics import evaluate
    from ..io.json import write_json
    from ..kinds import KINDS, kind_of
    from ..models.folders import trained_kind
    from ..models.loading import load_model, load_tokenizer
    from ..runtime import int8_encoder
    from ..runtime.int8 import report

    kind = trained_kind(options.model)
    if options.teacher is not None and kind.labelled:
        raise UserError("teacher is for models that give vectors; leave it out")
    model, tokenizer = load_model(options.model, kind).eval(), load_tokenizer(options.model)
    kind, device = kind_of(model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = int8_encoder(model)
    if encoder is not None and encoder.quality is not None:
        report(encoder.quality)
        device = torch.device("cpu")
    held_out = held_out_of(options, model, kind)
    schemas = [
        describe_split(
            name or "validation",
            data,
            held_out.readings[name],
            held_out.label_names,
            tokenizer,
            options.max_seq_length,
        )
        for name, data in held_out.splits.items()
    ]
    for line in (line for schema in schemas for line in schema.lines()):
        logger.info("data: %s", line)
    length = kind.limit(options.max_seq_length)

    def padded(data: Dataset) -> list[dict[str, torch.Tensor]]:
        return batches(data, tokenizer, options.batch_size, kind.collator(tokenizer))

    encoded = {name: kind.encode(data, tokenizer, length) for name, data in held_out.splits.items()}
    if options.teacher is not None:
        teacher = load_model(options.teacher, KINDS[kind.name]).eval().to(device)
        encoded[""] = kind.with_reference(encoded[""], teacher, padded(encoded[""]))
    model.to(device)
    others = {name: padded(data) for name, data in encoded.items() if name}
    metrics = evaluate(model, padded(encoded[""]), leading=held_out.leading, others=others)
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")
    if options.output_file is not None:
        write_json(
            options.output_file,
            {
                "model": options.model,
                "text": options.file or options.task_name,
                "examples": len(held_out.splits[""]),
                "data": [asdict(schema) for schema in schemas],
                "metrics": metrics,
            },
        )
