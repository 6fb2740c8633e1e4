"""Make the results that a suite of experiments lacks: ``python -m benchmarks.quality.run [--suite ablation]``.

``suite.py`` says what a suite is. Every cell of its grid is one record of ``benchmarks/results/SUITE.jsonl``; those
present are skipped, so a run that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import parse
from bert_decomp.config import DecompositionConfig
from bert_decomp.data.demo import cache_folder
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.distillation.teacher import prepare_teacher
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import divergence, predict
from bert_decomp.io.environment import environment
from bert_decomp.kinds import SINGLE_LABEL, kind_of
from bert_decomp.models.loading import count_parameters
from bert_decomp.models.nested import take_size_
from bert_decomp.models.selection import select_linears
from bert_decomp.pipeline.examples import Examples, read_task
from bert_decomp.pipeline.stages import distil
from bert_decomp.planning import (
    RankPlan,
    encoder_share,
    plan_ranks,
    sensitivity_weights,
    shapes_of,
)
from bert_decomp.planning.blocks import BlockPlan
from bert_decomp.planning.embedding import cuts_embedding
from bert_decomp.prediction.predictor import CALIBRATION as CALIBRATION_TEXTS
from bert_decomp.runtime import fuse_
from bert_decomp.statistics import (
    NEEDS,
    Statistics,
    collect_statistics,
    fingerprint,
    stored_embedding,
)

from ..records import read_records, save_record, suite_file
from .material import arguments_of
from .suite import CALIBRATION, STAGES, SUITES, Cell, cells, texts, training_options

SENSITIVITY_EXAMPLES = 256


class Bench:
    """One task, seed and number of calibration texts: the teacher, its statistics and the held-out batches, all made
    once."""

    def __init__(self, task: str, seed: int, cache: str | None, calibration: int = CALIBRATION):
        material = Path(cache or cache_folder()) / "material"
        arguments = [*arguments_of(task, material), "--seed", str(seed)] + (
            ["--cache_dir", cache] if cache else []
        )
        self.arguments, options = arguments, parse(arguments)
        task_data = read_task(options.data, options.model.model_name_or_path)
        self.data = task_data.fingerprint
        model = options.model
        self.teacher, self.tokenizer = prepare_teacher(
            model.model_name_or_path,
            task_data,
            model.cache,
            max_seq_length=options.data.max_seq_length,
            num_train_epochs=model.teacher_num_train_epochs,
            learning_rate=model.teacher_learning_rate,
            training=options.training,
        )
        self.teacher.to(options.training.device).eval()
        self.examples = Examples.of(
            task_data,
            self.teacher,
            self.tokenizer,
            options.data.max_seq_length,
            calibration_samples=calibration,
            batch_size=64,
            seed=seed,
        )
        self.is_labelled = task_data.is_labelled
        self.texts = min(calibration, len(self.examples.train))
        self.folder = model.cache / "statistics"
        self.name = f"{task}-{seed}" + (f"-{calibration}" if calibration != CALIBRATION else "")
        self.answers, self.metrics = self.evaluate(self.teacher)
        self.statistics = self._statistics()
        # The nested student that was trained last, by experiment and stage.
        self._nested: tuple[tuple[str, str], Any] | None = None

    def evaluate(self, model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, float]]:
        """A model's answers to the held-out examples, and their metrics."""
        answers, truth = predict(model, self.examples.held_out, progress=False)
        values = {name: value.numpy() for name, value in truth.items()}
        return answers, kind_of(model).metrics(answers.numpy(), values)

    def _statistics(self) -> Statistics:
        path = self.folder / f"{self.name}.safetensors"
        if path.is_file():
            statistics = Statistics.load(path)
            if statistics.fingerprint == fingerprint(self.teacher, self.examples.calibration):
                return statistics
        statistics = collect_statistics(
            self.teacher,
            self.examples.calibration,
            select_linears(self.teacher),
            needs=NEEDS,
            checkpoint=path.with_suffix(".partial"),
        )
        statistics.save(path)
        return statistics

    def with_embedding(self) -> None:
        """Have the statistics of the word embedding, too."""
        if self.statistics.embedding is None:
            self.statistics.embedding = stored_embedding(
                self.teacher,
                self.examples.calibration,
                self.folder / f"{self.name}-embedding.safetensors",
            )

    def result(self, cell: Cell, config: dict[str, Any]) -> dict[str, Any]:
        """Decompose, train as the stage says, evaluate."""
        student, plan, seconds, trained = self._student(cell, config)
        if plan.fractions:
            student, plan = take_size_(copy.deepcopy(student), cell.size), plan.at(cell.size)
        answers, metrics = self.evaluate(student)
        # Of vectors their metrics say how far they are from the teacher's.
        far = divergence(self.answers, answers) if self.examples.kind is SINGLE_LABEL else None
        training = training_options(cell.stage, config)
        return {
            **vars(cell),
            "data": self.data,
            "method": config["method"],
            "allocation": config["allocation"],
            "metrics": metrics,
            "teacher": self.metrics,
            **({} if far is None else {"divergence": far}),
            "encoder_fraction": plan.encoder_fraction,
            "expected_loss": plan.expected_loss,
            "parameters": count_parameters(student),
            "decompose_seconds": seconds,
            "training_options": training,
            "training_seconds": trained,
            "calibration_examples": self.texts,
            **_kept(plan),
            **(self._in_int8(student) if training is not None and far is not None else {}),
            "environment": environment(),
        }

    def _in_int8(self, student: PreTrainedModel) -> dict[str, Any]:
        """What the int8 runtime makes of a student."""
        sample = self.examples.sample(CALIBRATION_TEXTS)
        fused = fuse_(copy.deepcopy(student), dtype="int8", calibration=sample)
        answers, metrics = self.evaluate(fused)
        return {"int8": {"metrics": metrics, "divergence": divergence(self.answers, answers)}}

    def _size(self, cell: Cell, config: dict[str, Any]) -> dict[str, float]:
        """The option that sets a cell's size."""
        budget = config.get("budget", "encoder_fraction")
        if budget == "encoder_alone":
            shapes = shapes_of(select_linears(self.teacher))
            return {"encoder_fraction": encoder_share(self.teacher, shapes, cell.size)}
        return {budget: cell.size}

    def _student(
        self, cell: Cell, config: dict[str, Any]
    ) -> tuple[PreTrainedModel, RankPlan | BlockPlan, float, float]:
        """A student, its plan, and the seconds of decomposing and of training it. A nested one serves several cells."""
        chosen = config.get("decomposition", {})
        nested = "nested_fractions" in chosen
        if nested and self._nested is not None and self._nested[0] == (cell.experiment, cell.stage):
            return self._nested[1]
        decomposition = DecompositionConfig(
            config["method"],
            config["allocation"],
            **({} if nested else self._size(cell, config)),
            **chosen,
        )
        start = time.perf_counter()
        weights = None
        if decomposition.allocation == "sensitivity":
            weights = sensitivity_weights(
                self.teacher,
                decomposition,
                self.statistics,
                self.examples.sample(SENSITIVITY_EXAMPLES),
                cache=self.folder / f"{self.name}-{cell.experiment}-{cell.size:g}.json",
            )
        if cuts_embedding(self.teacher, decomposition, None):
            self.with_embedding()
        plan: RankPlan | BlockPlan | None = None
        if decomposition.units == "matrices":
            plan = plan_ranks(self.teacher, decomposition, self.statistics, weights)
        student = copy.deepcopy(self.teacher)
        plan = decompose_(
            student,
            decomposition,
            statistics=self.statistics,
            plan=plan,
            progress=False,
            batches=self.examples.calibration,
        )
        seconds = time.perf_counter() - start
        training = training_options(cell.stage, config)
        start = time.perf_counter()
        if training is not None:
            with tempfile.TemporaryDirectory() as folder:
                options = parse([*self.arguments, *training])
                distil(
                    student,
                    self.teacher,
                    options.distillation.config(
                        self.is_labelled, decomposition.units != "matrices"
                    ),
                    options.training,
                    self.examples.train,
                    self.tokenizer,
                    Path(folder),
                    calibration=self.examples.calibration if self.is_labelled else None,
                )
        trained = time.perf_counter() - start
        made = student, plan, seconds, trained
        if nested:
            self._nested = (cell.experiment, cell.stage), made
        return made


def _kept(plan: RankPlan | BlockPlan) -> dict[str, Any]:
    """What a plan keeps: the rank of every matrix, or the sizes of every layer."""
    embeddings = {name: entry.rank for name, entry in plan.embeddings.items()}
    about = {"embeddings": embeddings} if embeddings else {}
    if isinstance(plan, BlockPlan):
        return {"layers": plan.to_dict()["layers"], **about}
    return {"ranks": {name: entry.rank for name, entry in plan.matrices.items()}, **about}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--suite",
        default="methods",
        choices=sorted(path.stem for path in SUITES.glob("*.yaml")),
    )
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these seeds")
    parser.add_argument("--stages", nargs="*", choices=STAGES, help="only these stages")
    parser.add_argument(
        "--sizes", nargs="*", type=float, help="only these shares of the encoder's weights"
    )
    parser.add_argument("--experiments", nargs="*", help="only these experiments")
    parser.add_argument("--cache_dir", help="where teachers and statistics are kept")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/SUITE.jsonl)")
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    wanted = {
        "task": options.tasks,
        "seed": options.seeds,
        "stage": options.stages,
        "size": options.sizes,
        "experiment": options.experiments,
    }
    asked = [
        (cell, config)
        for cell, config in cells(options.suite)
        if all(only is None or getattr(cell, name) in only for name, only in wanted.items())
    ]
    if not asked:
        raise UserError(
            f"no cell of the suite {options.suite!r} matches; see benchmarks/quality/suites/{options.suite}.yaml"
        )
    path = options.output or suite_file(options.suite)
    present = {record["name"] for record in read_records(path)}
    todo = [(cell, config) for cell, config in asked if cell.name not in present]
    bench: Bench | None = None
    made: tuple[str, int, int] | None = None
    for cell, config in tqdm(todo, desc="cells"):
        key = (cell.task, cell.seed, texts(config))
        if bench is None or key != made:
            bench, made = Bench(cell.task, cell.seed, options.cache_dir, texts(config)), key
        result = bench.result(cell, config)
        save_record(path, cell.name, result)
        tqdm.write(json.dumps({**vars(cell), **result["metrics"]}))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(command(main))
