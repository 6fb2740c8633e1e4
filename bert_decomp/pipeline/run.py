"""The main job: it chains the stages from a fine-tuned model to a report.

Each stage writes its result into the output folder atomically, and a run that was stopped continues at the first stage
whose result is missing. Under ``torchrun`` or ``accelerate launch`` all processes train teacher and student together;
everything else is the first one's work, for which the others wait. All nodes must see the same folders.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.describe import describe
from ..data.schema import Schema
from ..data.task import Task
from ..decomposition.blocks import check_request
from ..distillation.features import FeatureCapture
from ..distillation.losses import DistillationConfig
from ..distillation.teacher import check_teachable, prepare_teacher
from ..errors import UserError
from ..evaluation.metrics import main_metric
from ..evaluation.report import report
from ..io.environment import environment
from ..io.json import read_json, write_json
from ..kinds import KINDS
from ..models.folders import load_skeleton, nested_fractions
from ..models.loading import count_parameters, load_model, load_tokenizer
from ..models.nested import ALL
from ..models.saving import save
from ..planning import read_plan
from ..planning.blocks import BlockPlan
from . import stages
from .examples import Examples, check_best_metric, read_task
from .options import Options
from .pareto import pareto
from .run_folder import RunFolder

logger = logging.getLogger("bert_decomp")


def run(options: Options) -> Path | None:
    """Run every stage and return the path of the report's page; None in every process but the first.

    Raises:
        UserError: anything that the user can fix.
    """
    # Everything that can be wrong with the request is found before anything is written or trained.
    training, name = options.training, options.model.model_name_or_path
    multiple = options.decomposition.multiple_on(training.device)
    options = replace(options, decomposition=replace(options.decomposition, rank_multiple=multiple))
    task = read_task(options.data, name)
    kind = KINDS[task.kind]
    check_teachable(name, task)
    check_best_metric(task, training)
    skeleton = load_skeleton(name, kind)
    for config in (
        options.decomposition,
        *map(options.decomposition.sized, options.measure.fractions()),
    ):
        check_request(skeleton, config)
    if options.distillation.cache_teacher_logits and not kind.row_per_example:
        raise UserError(
            f"cache_teacher_logits is not for {task.kind}, with answers for every token; drop it"
        )
    terms = _terms(options, task.is_labelled)
    FeatureCapture(skeleton, terms.features).close()

    folder = RunFolder(training.output_dir, is_main=training.process_index == 0)
    with contextlib.closing(folder):
        with training.main_process_first(local=False):
            if folder.is_main:
                folder.open(options.identity(), options.run.overwrite_output_dir)
        with stages.operators(options.run.fused):
            return _chain(folder, options, task, terms)


def _terms(options: Options, labelled: bool) -> DistillationConfig:
    """What the student learns: of a preset, without terms that have no counterpart where it gets other heads."""
    config = options.decomposition
    if config.plan_file is None:
        resized = config.units != "matrices"
    else:
        resized = isinstance(read_plan(config.plan_file), BlockPlan)
    terms = options.distillation.config(labelled, resized)
    preset = options.distillation.config(labelled)
    if resized and preset.terms_without_counterpart:
        logger.info(
            "distil: the student gets fewer or smaller heads, so the preset's term %s is left out",
            ", ".join(preset.terms_without_counterpart),
        )
    return terms


def _show_data(folder: RunFolder, options: Options, task: Task) -> Schema:
    """Print what was understood of the data, before anything long starts, and keep it in the folder."""
    tokenizer = load_tokenizer(options.model.model_name_or_path)
    schema = describe(task, tokenizer, options.data.max_seq_length)
    for line in schema.lines():
        print(f"data: {line}")
    write_json(folder.path / "data.json", schema.to_dict())
    return schema


def _chain(
    folder: RunFolder, options: Options, task: Task, terms: DistillationConfig
) -> Path | None:
    training, fused, kind = options.training, options.run.fused, KINDS[task.kind]
    schema = _show_data(folder, options, task) if folder.is_main else None
    set_seed(training.seed)
    with folder.stage("teacher"):
        teacher, tokenizer = prepare_teacher(
            options.model.model_name_or_path,
            task,
            options.model.cache,
            max_seq_length=options.data.max_seq_length,
            num_train_epochs=options.model.teacher_num_train_epochs,
            learning_rate=options.model.teacher_learning_rate,
            training=training,
        )
        teacher.to(training.device).eval()
        examples = Examples.of(
            task,
            teacher,
            tokenizer,
            options.data.max_seq_length,
            calibration_samples=options.run.calibration_samples,
            batch_size=options.run.calibration_batch_size,
            seed=training.seed,
        )

    statistics, file = None, folder.path / "statistics.safetensors"
    with folder.stage("statistics", file), training.main_process_first(local=False):
        if folder.is_main:
            statistics = stages.collect(
                file, teacher, options.decomposition, examples, options.run.statistics_layers
            )

    decomposed = folder.path / "decomposed"
    with folder.stage("decompose", decomposed), training.main_process_first(local=False):
        if folder.is_main and not decomposed.exists():
            stages.decompose(
                folder.path, teacher, options.decomposition, statistics, examples, fused=fused
            )
    # They may be larger than the model, and are read again where they are needed.
    statistics = None

    final = folder.path / "model"
    with folder.stage("distil", final):
        if not final.exists():
            if not task.is_labelled:
                logger.info(
                    "distil: the examples have no labels, so the preset's term task is left out"
                )
            student = stages.distil(
                load_model(str(decomposed), kind, **_all_sizes(decomposed)),
                teacher,
                terms,
                training,
                examples.train,
                tokenizer,
                folder.path,
                validation=examples.validation,
                patience=options.distillation.early_stopping_patience,
                cache_logits=options.distillation.cache_teacher_logits,
                calibration=examples.calibration if task.is_labelled else None,
                fused=options.run.fused,
            )
            if folder.is_main:
                save(student, tokenizer, final)
        if folder.is_main:
            shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    if not folder.is_main:
        return None

    student = load_model(str(final), kind).to(training.device).eval()
    inference = stages.inference_form(student, fused)
    with folder.stage("evaluate"):
        before = load_model(str(decomposed), kind).to(training.device).eval()
        sizes = {
            f"distilled, {share}": share for share in reversed(nested_fractions(str(final))[1:])
        }
        smaller = {
            name: load_model(str(final), kind, encoder_fraction=share).to(training.device).eval()
            for name, share in sizes.items()
        }
        metrics = stages.evaluate_models(
            {
                "teacher": teacher,
                "decomposed": stages.inference_form(before, fused),
                **{name: stages.inference_form(model, fused) for name, model in smaller.items()},
                "distilled": inference,
            },
            examples,
            task.main_metric,
        )

    with folder.stage("measure"):
        sentence = stages.backend_sentence(training.device, fused)
        print(sentence)
        timings = stages.measure_models(
            teacher, student, inference if fused else None, options.measure
        )
        curve = None
        if options.measure.fractions():
            statistics = stages.collect(file, teacher, options.decomposition, examples)
            curve = pareto(
                teacher,
                inference,
                options.decomposition,
                statistics,
                options.measure.fractions(),
                examples.held_out,
                batch_size=max(options.measure.batch_sizes()),
                length=options.measure.measure_seq_length,
                seconds=options.measure.measure_seconds,
                threads=options.measure.measure_threads,
                leading=task.main_metric,
                calibration=examples.calibration,
                fused=fused,
            )

    with folder.stage("report"):
        page = report(
            {
                "format": 1,
                "environment": environment(),
                "options": options.as_dict(),
                "task": {
                    "name": task.name,
                    "train": len(task.train),
                    "validation": len(task.validation),
                    "label_names": task.label_names,
                    "pipeline_tag": kind.pipeline_tag,
                    "fingerprint": task.fingerprint,
                    "schema": schema.to_dict() if schema else None,
                },
                "parameters": {
                    "teacher": count_parameters(teacher),
                    "student": count_parameters(student),
                    **{name: count_parameters(model) for name, model in smaller.items()},
                },
                "metrics": metrics,
                "sizes": sizes,
                "plan": read_json(folder.path / "plan.json"),
                "spectra": read_json(folder.path / "spectra.json"),
                "backend": sentence,
                "timings": timings,
                "pareto": curve,
                "distillation_log": read_json(folder.path / "distillation_log.json"),
                "stage_seconds": folder.seconds,
                "stage_peak_memory_mb": folder.peaks,
            },
            folder.path,
        )
    _print_summary(metrics, timings, final, page)
    return page


def _all_sizes(folder: Path) -> dict[str, Any]:
    """How a folder is loaded to be trained: with every size that it serves."""
    return {"encoder_fraction": ALL} if nested_fractions(str(folder)) else {}


def _print_summary(
    metrics: dict[str, dict[str, float]], timings: dict[str, Any], model: Path, page: Path
) -> None:
    name = main_metric(metrics["teacher"])
    print(
        "\n"
        + ", ".join(f"{stage} {100 * values[name]:.1f}" for stage, values in metrics.items())
        + f" ({name}, %)"
    )
    for row in timings["rows"]:
        print(
            f"{row['form']:>18}, batch {row['batch_size']:>3}: {row['latency_ms']:8.2f} ms, {row['speedup']:.2f}x"
        )
    print(f"\nmodel:  {model}\nreport: {page}")
