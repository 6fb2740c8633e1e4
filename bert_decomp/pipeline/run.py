"""The main job: ``python -m bert_decomp.run`` chains the stages from a fine-tuned model to a report.

    teacher -> statistics -> decompose -> distil -> evaluate -> measure -> report

Each stage writes its result into the output folder, whole or not at all, and a run that was stopped goes on at the
first stage whose result is not there. Under ``torchrun`` or ``accelerate launch`` all processes train teacher and student
together; everything else is the first one's work, for which the others wait. All nodes must see the same folders.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lowrank_kernels import explain_backend

from ..config import RENAMED
from ..data.batches import batches, encode, tokenize
from ..data.files import load_files
from ..data.task import Task, load_task
from ..decomposition.apply import apply_plan_
from ..decomposition.decompose import cuts_word_embedding
from ..decomposition.search import plan_for_config
from ..distillation.features import FeatureCapture
from ..distillation.resumable import fit
from ..distillation.teacher import (
    check_teachable,
    label_names_of,
    prepare_teacher,
    with_teacher_logits,
)
from ..distillation.trainer import DistillationTrainer
from ..errors import UserError
from ..evaluation.latency import measure
from ..evaluation.metrics import evaluate, main_metric, metrics_of
from ..evaluation.report import report
from ..io.atomic import exclusive_lock, remove, remove_leftovers
from ..io.environment import environment
from ..io.json import read_json, write_json
from ..models.loading import count_parameters, load_model, load_skeleton
from ..models.saving import save
from ..models.selection import select_linears
from ..planning import check_config, read_plan, relative_spectra, sensitivity_weights
from ..runtime import fuse_
from ..statistics import Statistics, collect_to_file, fingerprint, fitting_layers, stored_embedding
from .options import Options, parse
from .pareto import pareto

logger = logging.getLogger("bert_decomp")

STAGES = ("teacher", "statistics", "decompose", "distil", "evaluate", "measure", "report")
RUN_FILE = "run.json"
# What it says while an older run is being deleted.
DISCARDED = {"discarded": True}


class Run:
    """One output folder: which options it belongs to, and how long each stage took. Only the first process writes, and
    until ``close`` it keeps other runs out of the folder.

    Raises:
        UserError: the folder holds something else than a run with the same options, or a run is at work in it.
    """

    def __init__(self, options: Options):
        self.is_main = options.training.process_index == 0
        self.folder = Path(options.training.output_dir)
        self._seconds: dict[str, float] = {}
        self._held = contextlib.ExitStack()
        with options.training.main_process_first(local=False):
            if self.is_main:
                with contextlib.ExitStack() as held:
                    if self.folder.exists() and not self.folder.is_dir():
                        raise UserError(f"{self.folder} is a file; choose another --output_dir")
                    held.enter_context(exclusive_lock(self.folder))
                    self._open(options)
                    self._held = held.pop_all()

    def close(self) -> None:
        """Let other runs into the folder."""
        self._held.close()

    def _open(self, options: Options) -> None:
        identity = options.identity()
        # A run killed in its first moment leaves no more than this.
        remove_leftovers(self.folder, RUN_FILE)
        if not (self.folder / RUN_FILE).is_file() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} holds files of something else than a run; choose another --output_dir"
            )
        before = read_json(self.folder / RUN_FILE) if (self.folder / RUN_FILE).is_file() else None
        if before is not None and (options.run.overwrite_output_dir or before == DISCARDED):
            # First of all the folder is marked: what a kill leaves of the old run is never taken for results.
            write_json(self.folder / RUN_FILE, DISCARDED)
            for path in self.folder.iterdir():
                if path.name != RUN_FILE:
                    remove(path)
        elif before is not None:
            known = before.get("options") if isinstance(before, dict) else None
            known = known if isinstance(known, dict) else {}
            # A run of version 0.1 goes on: its options had other names.
            known = {RENAMED.get(name, name): value for name, value in known.items()}
            differing = sorted(
                name for name in {*identity, *known} if identity.get(name) != known.get(name)
            )
            if differing:
                name = differing[0]
                raise UserError(
                    f"{self.folder} holds another run ({name} was {known.get(name)!r}, is {identity.get(name)!r}); "
                    "choose another --output_dir, or discard it with --overwrite_output_dir"
                )
            seconds = before.get("stage_seconds") if isinstance(before, dict) else None
            self._seconds = (
                {
                    stage: float(value)
                    for stage, value in seconds.items()
                    if isinstance(value, (int, float))
                }
                if isinstance(seconds, dict)
                else {}
            )
        self._identity = identity
        self._write()
        remove_leftovers(self.folder)

    def _write(self) -> None:
        write_json(
            self.folder / RUN_FILE, {"options": self._identity, "stage_seconds": self._seconds}
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds that each finished stage took when it really ran."""
        return {name: self._seconds[name] for name in STAGES if name in self._seconds}

    @contextlib.contextmanager
    def stage(self, name: str, result: Path | None = None) -> Iterator[None]:
        """Announce and time a stage; one whose ``result`` is already there keeps the time it took then."""
        done = result is not None and result.exists()
        if self.is_main:
            print(
                f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}{': done before' if done else ''}",
                flush=True,
            )
        start = time.perf_counter()
        yield
        if self.is_main and (not done or name not in self._seconds):
            self._seconds[name] = time.perf_counter() - start
            self._write()


def get_task(options: Options) -> Task:
    """The task that the options name, shortened as they ask."""
    data = options.data
    if data.train_file is not None:
        columns = data.text_column_names.split(",") if data.text_column_names else None
        task = load_files(
            data.train_file,
            data.validation_file,
            columns,
            data.label_column_name,
            label_names_of(options.model.model_name_or_path),
        )
    else:
        task = load_task(data.task_name, data.data_dir)
    return task.limited(data.max_train_samples, data.max_eval_samples)


def calibration_batches(
    options: Options, train: Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """The examples that statistics are collected from."""
    sample = train.shuffle(seed=options.training.seed).select(
        range(min(options.run.calibration_samples, len(train)))
    )
    return batches(sample, tokenizer, options.run.calibration_batch_size)


def get_statistics(
    run: Run,
    options: Options,
    teacher: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> Statistics | None:
    """What the method must know of the data, from the folder if an earlier run left it there."""
    config = options.decomposition
    plan = None if config.plan_file is None else read_plan(config.plan_file)
    cuts_embedding = cuts_word_embedding(config, plan)
    if not config.needs and not cuts_embedding:
        return None
    path = run.folder / "statistics.safetensors"
    calibration = calibration_batches(options, train, tokenizer)
    if not path.is_file():
        modules = select_linears(teacher, config.include, config.exclude)
        layers = options.run.statistics_layers or fitting_layers(teacher, modules, config.needs)
        collect_to_file(
            path, teacher, calibration, modules, needs=config.needs, layers_at_once=layers
        )
    statistics = Statistics.load(path)
    statistics.check(fingerprint(teacher, calibration))
    if cuts_embedding:
        statistics.embedding = stored_embedding(
            teacher, calibration, path.with_name("embedding.safetensors")
        )
    return statistics


def distil(
    options: Options,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Path,
    validation: Dataset | None = None,
) -> PreTrainedModel:
    """Feature distillation of ``student`` from ``teacher``, resumed from ``checkpoints`` if there are any.

    Args:
        train: encoded examples; without ``labels`` the term ``task`` is left out.
        validation: encoded labelled examples, for evaluation while training if the options ask for it.

    Raises:
        UserError: what the options ask for does not fit the models or the data.
    """
    set_seed(options.training.seed)
    arguments = copy.copy(options.training)
    arguments.output_dir = str(checkpoints)
    labelled = "labels" in train.column_names
    config = options.distillation.config(labelled)
    if not labelled:
        logger.info("distil: the examples have no labels, so the preset's term task is left out")
    callbacks = []
    if options.distillation.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.distillation.early_stopping_patience))
        # Without this a resumed run would count evaluations without improvement from zero.
        arguments.restore_callback_states_from_checkpoint = True
    if options.distillation.cache_teacher_logits:
        with arguments.main_process_first(local=False):
            train = with_teacher_logits(
                teacher,
                train,
                tokenizer,
                checkpoints.with_name("teacher_logits.safetensors"),
                arguments.per_device_eval_batch_size,
            )
    trainer = DistillationTrainer(
        student,
        arguments,
        train_dataset=train,
        processing_class=tokenizer,
        eval_dataset=validation if arguments.eval_strategy != "no" else None,
        compute_metrics=lambda found: metrics_of(found.predictions, found.label_ids),
        data_collator=DataCollatorWithPadding(tokenizer),
        teacher=teacher,
        distillation=config,
        callbacks=callbacks,
    )
    try:
        fit(trainer)
    finally:
        trainer.close()
    if trainer.is_world_process_zero():
        write_json(checkpoints.with_name("distillation_log.json"), trainer.state.log_history)
    return student


def decompose(
    run: Run,
    options: Options,
    teacher: PreTrainedModel,
    train: Dataset,
    held_out: list[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    statistics: Statistics | None,
) -> None:
    """Plan the ranks, factor a copy of the teacher, and leave plan, spectra and model in the run's folder."""
    weights = None
    if options.decomposition.allocation == "sensitivity":
        sample = train.shuffle(seed=options.training.seed).select(range(min(256, len(train))))
        weights = sensitivity_weights(
            teacher,
            options.decomposition,
            statistics,
            batches(sample, tokenizer, options.run.calibration_batch_size),
            cache=run.folder / "sensitivity.json",
        )
    student = copy.deepcopy(teacher)
    plan = plan_for_config(
        teacher,
        options.decomposition,
        statistics,
        held_out,
        weights=weights,
        fused=options.run.fused,
    )
    apply_plan_(
        student,
        plan,
        options.decomposition,
        statistics,
        calibration_batches(options, train, tokenizer) if options.decomposition.anchored else None,
    )
    write_json(run.folder / "plan.json", plan.to_dict())
    write_json(
        run.folder / "spectra.json",
        {
            name: values.tolist()
            for name, values in relative_spectra(teacher, options.decomposition, statistics).items()
        },
    )
    save(student, tokenizer, run.folder / "decomposed")


def run(options: Options) -> Path | None:
    """Run every stage and return the path of the report's page; None in every process but the first.

    Raises:
        UserError: anything that the user can mend.
    """
    # Everything that can be wrong with the request is found before anything is written or trained.
    options.decomposition.rank_multiple = options.decomposition.multiple_on(options.training.device)
    task, name = get_task(options), options.model.model_name_or_path
    check_teachable(name, task)
    skeleton = load_skeleton(name)
    check_config(skeleton, options.decomposition)
    for share in options.run.pareto_shares():
        check_config(skeleton, options.decomposition.sized(share))
    FeatureCapture(skeleton, options.distillation.config(task.is_labelled).features).close()
    with contextlib.closing(Run(options)) as opened:
        return _stages(opened, options, task)


def _stages(run: Run, options: Options, task: Task) -> Path | None:
    training = options.training
    set_seed(training.seed)
    with run.stage("teacher"):
        teacher, tokenizer = prepare_teacher(
            options.model.model_name_or_path,
            task,
            options.model.cache,
            max_seq_length=options.data.max_seq_length,
            num_train_epochs=options.model.teacher_num_train_epochs,
            learning_rate=options.model.teacher_learning_rate,
            training=training,
        )
        train, validation = tokenize(task, tokenizer, options.data.max_seq_length)
        held_out = batches(validation, tokenizer, options.run.calibration_batch_size)
        device = training.device
        teacher.to(device).eval()

    with (
        run.stage("statistics", run.folder / "statistics.safetensors"),
        training.main_process_first(local=False),
    ):
        statistics = (
            get_statistics(run, options, teacher, train, tokenizer) if run.is_main else None
        )

    decomposed = run.folder / "decomposed"
    with run.stage("decompose", decomposed), training.main_process_first(local=False):
        if run.is_main and not decomposed.exists():
            decompose(run, options, teacher, train, held_out, tokenizer, statistics)

    final = run.folder / "model"
    with run.stage("distil", final):
        if not final.exists():
            checkpoints = run.folder / "checkpoints"
            student = distil(
                options,
                load_model(str(decomposed)),
                teacher,
                train,
                tokenizer,
                checkpoints,
                validation,
            )
            if run.is_main:
                save(student, tokenizer, final)
        if run.is_main:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    if not run.is_main:
        return None

    student = load_model(str(final)).to(device).eval()
    with run.stage("evaluate"):
        others = {
            name: batches(
                encode(split, tokenizer, options.data.max_seq_length),
                tokenizer,
                options.run.calibration_batch_size,
            )
            for name, split in task.others.items()
        }
        models = {
            "teacher": teacher,
            "decomposed": load_model(str(decomposed)).to(device),
            "distilled": student,
        }
        metrics = {
            name: evaluate(model, held_out, title=name, leading=task.main_metric, others=others)
            for name, model in models.items()
        }

    with run.stage("measure"):
        backend, reason = explain_backend(device)
        sentence = (
            f"Fused operators: backend {backend}, because {reason}."
            if options.run.fused
            else ("Fused operators were not asked for (--fused).")
        )
        print(sentence)
        forms = {"dense": (teacher, None), "low-rank, unfused": (student, "torch")}
        if options.run.fused:
            forms["low-rank, fused"] = (fuse_(copy.deepcopy(student)), None)
        timings = measure(
            forms,
            options.run.batch_sizes(),
            options.run.measure_seq_length,
            seconds=options.run.measure_seconds,
            threads=options.run.measure_threads,
        )
        curve = None
        if options.run.pareto_shares():
            curve = pareto(
                teacher,
                student,
                options.decomposition,
                statistics,
                options.run.pareto_shares(),
                held_out,
                batch_size=max(options.run.batch_sizes()),
                length=options.run.measure_seq_length,
                seconds=options.run.measure_seconds,
                threads=options.run.measure_threads,
                leading=task.main_metric,
                calibration=calibration_batches(options, train, tokenizer)
                if options.decomposition.anchored
                else None,
            )

    with run.stage("report"):
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
                    "fingerprint": task.fingerprint,
                },
                "parameters": {
                    "teacher": count_parameters(teacher),
                    "student": count_parameters(student),
                },
                "metrics": metrics,
                "plan": read_json(run.folder / "plan.json"),
                "spectra": read_json(run.folder / "spectra.json"),
                "backend": sentence,
                "timings": timings,
                "pareto": curve,
                "distillation_log": read_json(run.folder / "distillation_log.json"),
                "stage_seconds": run.seconds,
            },
            run.folder,
        )
    _print_summary(metrics, timings, run.folder, page)
    return page


def _print_summary(
    metrics: dict[str, dict[str, float]], timings: dict[str, Any], folder: Path, page: Path
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
    print(f"\nmodel:  {folder / 'model'}\nreport: {page}")


def main(argv: list[str]) -> None:
    transformers_logging.set_verbosity_error()
    # Each stage has a bar of its own; those of the libraries' inner steps would only tear it up.
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    options = parse(argv)
    if options.training.process_index:
        logging.getLogger("bert_decomp").setLevel(logging.WARNING)
    # Beside the checkpoints, which go when they have served, and for this run alone.
    events = os.environ.get(
        "TENSORBOARD_LOGGING_DIR", Path(options.training.output_dir) / "tensorboard"
    )
    with patch_environment(TENSORBOARD_LOGGING_DIR=events):
        run(options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
