"""How well a text answers a query: a cross-encoder with one output, in the layout of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from sklearn.metrics import ndcg_score
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.files import load_files, load_labelled
from ..data.groups import read_pairs
from ..data.schema import Reading
from ..errors import UserError
from ..io.json import read_json
from .kind import leading_first
from .pooling import MODULES
from .regression import Regression

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.files import ReadOptions
    from ..data.task import Task

# Answers to a query that are looked at.
DEPTH = 10
SETTINGS = "config_sentence_transformers.json"
FILES = (MODULES, SETTINGS, "sentence_bert_config.json")


@dataclass(frozen=True)
class Reranking(Regression):
    """Answers are scores before the sigmoid (pairs, 1), labels shares of the best grade, 0 to 1 (pairs,).

    Attributes:
        files: what a folder of sentence-transformers holds beside the model, by name.
    """

    files: dict[str, str] = field(default_factory=dict, compare=False)

    name = "reranking"
    pipeline_tag = "text-ranking"
    own_loss = True

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        """By what sentence-transformers 5 and before wrote into the config; ``is_cross_encoder`` knows later ones."""
        return super().recognises(config, class_name) and (
            isinstance(getattr(config, "sentence_transformers", None), dict)
            or hasattr(config, "sbert_ce_default_activation_function")
        )

    def loaded(self, folder: str | Path, config: Any) -> Reranking:
        if not is_cross_encoder(folder):
            return replace(self, files=_plain_files())
        found = {name: Path(folder) / name for name in FILES}
        files = {
            name: path.read_text(encoding="utf-8") for name, path in found.items() if path.is_file()
        }
        return replace(self, files=files)

    def save(self, model: nn.Module, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    # Data

    def read(self, train_file: str, validation_file: str | None, options: ReadOptions) -> Task:
        task = load_files(
            train_file,
            validation_file,
            options.text_columns,
            options.label_column,
            options.model,
            self.problem_type,
            read=read_pairs,
            held_out_by="text",
        )
        splits, readings = {"train": task.train, "validation": task.validation}, dict(task.readings)
        # Both by the grades of the one that has some.
        source = task.train if task.is_labelled else task.validation
        best = max(source["label"])
        for name, split in splits.items():
            splits[name], readings[name] = _graded(split, readings[name], best)
        return replace(task, **splits, readings=readings, kind=self.name)

    def read_held_out(self, path: str, options: ReadOptions) -> tuple[Dataset, Reading]:
        assert options.model is not None
        data, reading = load_labelled(
            path, options.model, options.text_columns, options.label_column, read=read_pairs
        )
        return _graded(data, reading, max(data["label"]))

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        """Pairs, with ``query``: the number of the first text."""
        numbers: dict[str, int] = {}
        queries = [numbers.setdefault(text, len(numbers)) for text in data["text"]]
        return super().encode(data, tokenizer, max_seq_length).add_column("query", queries)

    # Losses and metrics

    def truth(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("labels", "query")}

    def task_loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Binary cross-entropy, as sentence-transformers trains cross-encoders with one output."""
        if "labels" not in inputs:
            return None
        labels = inputs["labels"].to(outputs.logits.dtype)
        return F.binary_cross_entropy_with_logits(outputs.logits.flatten(), labels)

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """ndcg_at_10 (gain: the label) and mrr_at_10 (relevant: at least half of the best grade), means over queries
        with several texts of which some is relevant; spearmanr and pearson of all pairs."""
        scores = answers.reshape(-1)
        gains: list[float] = []
        ranks: list[float] = []
        # While training, Trainer gathers no queries.
        query = truth.get("query", np.arange(len(scores)))
        order = np.argsort(query, kind="stable")
        bounds = np.flatnonzero(np.diff(query[order])) + 1
        for rows in np.split(order, bounds):
            labels = truth["labels"][rows]
            if len(rows) < 2 or not (labels >= 0.5).any():
                continue
            gains.append(float(ndcg_score([labels], [scores[rows]], k=DEPTH)))
            best = labels[np.argsort(-scores[rows], kind="stable")][:DEPTH] >= 0.5
            ranks.append(1 / (int(best.argmax()) + 1) if best.any() else 0.0)
        found = super().metrics(answers, truth)
        if gains:
            ranked = {"ndcg_at_10": float(np.mean(gains)), "mrr_at_10": float(np.mean(ranks))}
            found = {**ranked, **found}
        return leading_first(found, leading)


def _graded(data: Dataset, reading: Reading, best: float) -> tuple[Dataset, Reading]:
    """Labels as shares of the best grade.

    Raises:
        UserError: a label is below 0 or above the best, there is no second text, or nothing is relevant.
    """
    if "text_pair" not in data.column_names:
        raise UserError(
            f"{reading.source} has one text a row; a query and a text are needed: name both with text_column_names"
        )
    if "label" not in data.column_names:
        return data, reading
    labels = data["label"][:]
    if best <= 0 or not all(0 <= label <= best for label in labels):
        raise UserError(
            f"{reading.source} has labels from {min(labels):g} to {max(labels):g}; give 0 or 1, or grades from 0 to "
            "the best one in the training file"
        )
    if best == 1:
        return data, reading
    scaled = data.remove_columns("label").add_column("label", [label / best for label in labels])
    return scaled, replace(
        reading, notes=(*reading.notes, f"labels are divided by the best grade, {best:g}")
    )


def is_cross_encoder(folder: str | Path) -> bool:
    """Whether sentence-transformers 6 wrote the folder of a cross-encoder."""
    path = Path(folder) / SETTINGS
    values = read_json(path) if path.is_file() else None
    return isinstance(values, dict) and values.get("model_type") == "CrossEncoder"


def _plain_files() -> dict[str, str]:
    """The files of a cross-encoder of sentence-transformers 6 whose score is a probability."""
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    contents: dict[str, Any] = {
        MODULES: [{"idx": 0, "name": "0", "path": "", "type": kind}],
        SETTINGS: {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
            "prompts": {},
            "default_prompt_name": None,
        },
        "sentence_bert_config.json": {
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
        },
    }
    return {name: json.dumps(values, indent=2) for name, values in contents.items()}


RERANKING = Reranking()
