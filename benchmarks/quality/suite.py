"""Suites of experiments and their cells.

A suite is a file in ``suites/``: ``methods`` compares decompositions, ``ablation`` terms of the distillation,
``presets`` some sets of them on several seeds. An experiment is an entry under ``experiments``: method, allocation,
under ``decomposition`` other fields of ``DecompositionConfig`` and, where it departs from the suite's ``defaults``,
tasks, seeds, calibration texts (``calibration``) and, by stage of training, sizes. A size is a share of the encoder's
weights or, by ``budget``, of the whole model's (``model_fraction``, or ``encoder_alone``: the same without a cut of the
word embedding). ``options`` are options of the main job for the training after the decomposition, ``without`` a term,
or several, left out of the preset that they name. Every cell of the grid is one record of
``benchmarks/results/SUITE.jsonl``; those present are skipped, so a run that was stopped continues where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bert_decomp.distillation.losses import PRESETS
from bert_decomp.errors import UserError

SUITES = Path(__file__).resolve().parent / "suites"
# What each stage trains with after the decomposition, before the experiment's own options; None is no training.
STAGES: dict[str, dict[str, Any] | None] = {
    "before": None,
    "fine-tuned": {"distillation_terms": "task=1"},
    "distilled": {},
    **{preset: {"distillation_preset": preset} for preset in PRESETS},
}
CALIBRATION = 2000


@dataclass(frozen=True)
class Cell:
    """One number of the table: an experiment at one size, task, seed and stage."""

    suite: str
    experiment: str
    task: str
    seed: int
    size: float
    stage: str

    @property
    def name(self) -> str:
        """The name of its record in the suite's result file."""
        return f"{self.experiment}/{self.task}-{self.seed}-{self.size:g}-{self.stage}"


def cells(suite: str) -> list[tuple[Cell, dict[str, Any]]]:
    """Every cell of every experiment, with its configuration; those of one teacher lie together."""
    content = yaml.safe_load((SUITES / f"{suite}.yaml").read_text(encoding="utf-8"))
    result: list[tuple[Cell, dict[str, Any]]] = []
    for name, experiment in content["experiments"].items():
        config = {**content["defaults"], **experiment}
        result += [
            (Cell(suite, name, task, seed, size, stage), config)
            for task in config["tasks"]
            for seed in config["seeds"]
            for stage, sizes in config["sizes"].items()
            for size in sizes
        ]
    order = list(STAGES)
    return sorted(
        result,
        key=lambda item: (
            item[0].task != "questions",
            item[0].seed,
            texts(item[1]),
            order.index(item[0].stage),
            item[0].experiment,
            item[0].size,
        ),
    )


def texts(config: dict[str, Any]) -> int:
    """Calibration texts of an experiment."""
    return config.get("calibration", CALIBRATION)


def training_options(stage: str, config: dict[str, Any]) -> list[str] | None:
    """The options of the main job that a stage trains with, or None if it does not train."""
    if STAGES[stage] is None:
        return None
    options = {**STAGES[stage], **config.get("options", {})}
    if "without" in config:
        preset = PRESETS[options.pop("distillation_preset")]
        left_out = [config["without"]] if isinstance(config["without"], str) else config["without"]
        for name in left_out:
            if name not in preset.terms:
                raise UserError(
                    f"an experiment leaves out {name!r}, which its preset does not have"
                )
        options["distillation_terms"] = ",".join(
            f"{name}={weight}" for name, weight in preset.terms.items() if name not in left_out
        )
        options["distillation_temperature"] = preset.temperature
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
