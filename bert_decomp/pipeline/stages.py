"""The stages of the main job, one function each. Each takes what it needs as values and knows of no options.

teacher -> statistics -> decompose -> distil -> evaluate -> measure -> report
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from lowrank_kernels import explain_backend, use_backend

from ..config import DecompositionConfig
from ..decomposition.apply import apply_plan_
from ..decomposition.blocks import decompose_blocks_
from ..decomposition.search import plan_for_config
from ..distillation.backend import training_backend
from ..distillation.distil import distil as train_student
from ..distillation.losses import DistillationConfig
from ..distillation.teacher import with_teacher_logits
from ..evaluation.latency import measure
from ..evaluation.metrics import evaluate
from ..io.json import write_json
from ..kinds import kind_of
from ..models.saving import save
from ..models.selection import select_linears
from ..planning import read_plan, relative_spectra, sensitivity_weights
from ..planning.blocks import BlockPlan
from ..planning.embedding import cuts_embedding
from ..runtime import fuse_
from ..statistics import Statistics, collect_to_file, fingerprint, fitting_layers, stored_embedding
from .examples import Batches, Examples
from .options import MeasureArguments

logger = logging.getLogger("bert_decomp")

# Examples from which the allocation "sensitivity" measures each matrix.
SENSITIVITY_EXAMPLES = 256


@contextlib.contextmanager
def operators(fused: bool) -> Iterator[None]:
    """Run factored layers through the dispatcher's choice of operator, or, unfused, as two library matmuls."""
    with contextlib.nullcontext() if fused else use_backend("torch"):
        yield


def collect(
    path: Path,
    teacher: PreTrainedModel,
    config: DecompositionConfig,
    examples: Examples,
    layers_at_once: int | None = None,
) -> Statistics | None:
    """What the method must know of the data, from the file ``path`` or collected into it; None if nothing.

    Raises:
        UserError: the file is of another model or other data.
    """
    plan = read_plan(config.plan_file) if config.plan_file is not None else None
    with_embedding = cuts_embedding(teacher, config, plan)
    if not config.needs and not with_embedding:
        return None
    if not path.is_file():
        modules = select_linears(teacher, config.include, config.exclude)
        collect_to_file(
            path,
            teacher,
            examples.calibration,
            modules,
            needs=config.needs,
            layers_at_once=layers_at_once or fitting_layers(teacher, modules, config.needs),
        )
    statistics = Statistics.load(path)
    statistics.check(fingerprint(teacher, examples.calibration))
    if with_embedding:
        statistics.embedding = stored_embedding(
            teacher, examples.calibration, path.with_name("embedding.safetensors")
        )
    return statistics


def decompose(
    folder: Path,
    teacher: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    examples: Examples,
    *,
    fused: bool = False,
) -> None:
    """Plan the ranks, factor a copy of the teacher, write plan, spectra and the model ``decomposed`` into ``folder``.

    Args:
        fused: a latency to meet is that of the fused model.
    """
    written = None if config.plan_file is None else read_plan(config.plan_file)
    if isinstance(written, BlockPlan) or (written is None and config.units != "matrices"):
        student = copy.deepcopy(teacher)
        blocks = decompose_blocks_(
            student,
            config,
            statistics,
            examples.calibration,
            plan=written,
            held_out=examples.held_out,
            fused=fused,
        )
        write_json(folder / "plan.json", blocks.to_dict())
        # Layers are not cut along the spectra of their matrices.
        write_json(folder / "spectra.json", {})
        save(student, examples.tokenizer, folder / "decomposed")
        return
    weights = None
    if config.allocation == "sensitivity":
        weights = sensitivity_weights(
            teacher,
            config,
            statistics,
            examples.sample(SENSITIVITY_EXAMPLES),
            cache=folder / "sensitivity.json",
        )
    plan = plan_for_config(
        teacher, config, statistics, examples.held_out, weights=weights, fused=fused
    )
    student = copy.deepcopy(teacher)
    apply_plan_(
        student,
        plan,
        config,
        statistics,
        examples.calibration if config.anchored else None,
    )
    write_json(folder / "plan.json", plan.to_dict())
    write_json(
        folder / "spectra.json",
        {
            name: values.tolist()
            for name, values in relative_spectra(teacher, config, statistics).items()
        },
    )
    save(student, examples.tokenizer, folder / "decomposed")


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: DistillationConfig,
    training: TrainingArguments,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    validation: Dataset | None = None,
    patience: int | None = None,
    cache_logits: bool = False,
    calibration: Batches | None = None,
    fused: bool = False,
) -> PreTrainedModel:
    """Distil ``student`` from ``teacher``, resumed from ``folder``'s checkpoints if there are any; return it.

    Args:
        config: the terms of the loss.
        training: transformers' training arguments; checkpoints go into ``folder``/checkpoints.
        train: encoded examples.
        validation: encoded labelled examples, for evaluation while training if ``training`` asks for it.
        patience: stop after so many evaluations without a better metric.
        cache_logits: run the teacher once over ``train`` instead of at every step.
        calibration: labelled training examples, from which the student's config is settled (see ``Kind.settle_``).
        fused: on a GPU, train by fused operators if a step is faster by them.

    Raises:
        UserError: the terms do not fit the models or the data.
    """
    set_seed(training.seed)
    arguments = copy.copy(training)
    arguments.output_dir = str(folder / "checkpoints")
    callbacks = []
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
        # Without this a resumed run would count evaluations without improvement from zero.
        arguments.restore_callback_states_from_checkpoint = True
    if cache_logits:
        with arguments.main_process_first(local=False):
            train = with_teacher_logits(
                teacher,
                train,
                tokenizer,
                folder / "teacher_logits.safetensors",
                arguments.per_device_eval_batch_size,
            )
    backend = training_backend(student, arguments, train, tokenizer) if fused else "torch"
    with use_backend(backend):
        log = train_student(
            student,
            teacher,
            train,
            tokenizer,
            arguments,
            distillation=config,
            eval_dataset=validation if arguments.eval_strategy != "no" else None,
            callbacks=callbacks,
        )
    if calibration is not None:
        kind_of(student).settle_(student, calibration)
    if arguments.process_index == 0:
        write_json(folder / "distillation_log.json", log)
    return student


def evaluate_models(
    models: dict[str, PreTrainedModel], examples: Examples, leading: str | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of each model on every held-out split; ``leading`` names the metric that comes first."""
    others = {name: examples.batches(split) for name, split in examples.others.items()}
    return {
        name: evaluate(model, examples.held_out, title=name, leading=leading, others=others)
        for name, model in models.items()
    }


def measure_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    fused: PreTrainedModel | None,
    settings: MeasureArguments,
) -> dict[str, Any]:
    """Latency and memory of the dense model, the low-rank one as two matmuls, and its fused form if given."""
    forms: dict[str, tuple[PreTrainedModel, str | None]] = {
        "dense": (teacher, None),
        "low-rank, unfused": (student, "torch"),
    }
    if fused is not None:
        forms["low-rank, fused"] = (fused, None)
    return measure(
        forms,
        settings.batch_sizes(),
        settings.measure_seq_length,
        seconds=settings.measure_seconds,
        threads=settings.measure_threads,
    )


def backend_sentence(device: torch.device, fused: bool) -> str:
    """Which backend the fused operators run on, and why."""
    if not fused:
        return "Fused operators were not asked for (option fused)."
    backend, reason = explain_backend(device)
    return f"Fused operators: backend {backend}, because {reason}."


def inference_form(student: PreTrainedModel, fused: bool) -> PreTrainedModel:
    """The student as it is evaluated: a fused copy, or itself."""
    return fuse_(copy.deepcopy(student)) if fused else student
