"""A vector a text, in the layout of sentence-transformers: the student's vectors follow the teacher's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import encode, length_order
from ..data.texts import load_texts, read_texts
from ..errors import UserError
from ..io.json import read_json
from .kind import Kind, leading_first, random_signs
from .pooling import MODULES, Pooling, read_pooling

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.files import ReadOptions
    from ..data.schema import Reading
    from ..data.task import Task

# Neighbours that a search is judged by.
NEIGHBOURS = 10
# Rows of similarities that are held at once.
BLOCK = 1024
# Files of a sentence-transformers folder beside those of the encoder and of the modules after it.
SETTINGS = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")


@dataclass(frozen=True)
class Embedding(Kind):
    """Answers are pooled vectors (rows, width); the truth are the teacher's.

    Attributes:
        pooling: from token vectors to one.
        files: what a folder of sentence-transformers holds beside the encoder, by path.
    """

    pooling: Pooling = field(default_factory=Pooling)
    files: dict[str, str] = field(default_factory=dict, compare=False)

    name = "embedding"
    auto = AutoModel
    outputs = ("last_hidden_state",)
    pipeline_tag = "sentence-similarity"
    labelled = evaluates_in_training = False

    def has_head(self, config: Any, class_name: str | None = None) -> bool:
        return True

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        """A bare encoder in memory is one; a folder of one may as well be there to be fine-tuned as a classifier."""
        return class_name is not None and class_name.endswith("Model")

    def loaded(self, folder: str | Path, config: Any) -> Embedding:
        """With the pooling of a sentence-transformers folder; the mean of all tokens for any other."""
        pooling = read_pooling(folder)
        if pooling is None:
            return Embedding(Pooling(), _plain_files(config.hidden_size))
        root = Path(folder)
        names = [
            *SETTINGS,
            *(f"{entry['path']}/config.json" for entry in read_json(root / MODULES)[1:]),
        ]
        found = {name: root / name for name in names}
        return Embedding(
            pooling,
            {
                name: path.read_text(encoding="utf-8")
                for name, path in found.items()
                if path.is_file()
            },
        )

    def save(self, model: nn.Module, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    # Data

    def read(self, train_file: str, validation_file: str | None, options: ReadOptions) -> Task:
        columns = options.text_columns, options.label_column
        return load_texts(train_file, validation_file, *columns, self.name)

    def read_held_out(self, path: str, options: ReadOptions) -> tuple[Dataset, Reading]:
        return read_texts(path, options.text_columns, options.label_column)

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        """Every text by itself; of pairs first the one, then the other, with ``pair`` and ``score``."""
        from datasets import Dataset

        columns = [data[name][:] for name in ("text", "text_pair") if name in data.column_names]
        rows = {
            "text": [
                self.pooling.prompt + text for texts in zip(*columns, strict=True) for text in texts
            ]
        }
        encoded = encode(Dataset.from_dict(rows), tokenizer, max_seq_length)
        if "label" in data.column_names and len(columns) == 2:
            for name, values in (("pair", range(len(data))), ("score", data["label"][:])):
                encoded = encoded.add_column(
                    name, [float(value) for value in values for _ in columns]
                )
        return encoded

    def limit(self, max_seq_length: int) -> int:
        return min(max_seq_length, self.pooling.max_length or max_seq_length)

    def with_reference(
        self, data: Dataset, teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
    ) -> Dataset:
        """With the teacher's vectors as ``labels``."""
        found, _ = self.predict(teacher, batches, title="teacher's vectors")
        vectors = torch.empty_like(found)
        vectors[length_order(data)] = found
        return data.add_column("labels", vectors.tolist())

    # Answers and losses

    def answers(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.pooling(outputs.last_hidden_state, inputs["attention_mask"])

    def truth(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("labels", "pair", "score") if name in batch}

    def decisions(self, answers: Tensor) -> Tensor | None:
        return None

    def sampled_loss(
        self, answers: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """The vectors times random signs: the mean outer gradient is that of the squared distance from the teacher."""
        return (answers * random_signs(answers, generator)).sum()

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """1 - cosine, mean over rows, and the mean squared difference over the variance of the teacher's vectors."""
        variance = (teacher - teacher.mean()).square().mean().clamp_min(1e-12)
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean() + F.mse_loss(
            student, teacher
        ) / variance

    def task_loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return None

    # Metrics

    def metrics(
        self, answers: np.ndarray, truth: Mapping[str, np.ndarray], leading: str | None = None
    ) -> dict[str, float]:
        """cosine to the teacher's vectors; recall at 10 of the teacher's own neighbours, once searched for among the
        teacher's vectors (an index that stays) and once among the model's; of scored pairs, spearmanr of the cosines.

        Each text is searched for among all others; fewer than 10 others are all of them.
        """
        found: dict[str, float] = {}
        own = _unit(answers)
        if "labels" in truth:
            index = _unit(truth["labels"])
            found["cosine"] = float((own * index).sum(-1).mean())
            wanted = _neighbours(index, index)
            for name, documents in (("recall_at_10", index), ("recall_at_10_own_index", own)):
                found[name] = _overlap(wanted, _neighbours(own, documents))
        if "pair" in truth:
            order = np.argsort(truth["pair"], kind="stable")
            cosines = (own[order[::2]] * own[order[1::2]]).sum(-1)
            scores = truth["score"][order[::2]]
            constant = np.ptp(cosines) == 0 or np.ptp(scores) == 0
            found["spearmanr"] = 0.0 if constant else float(spearmanr(cosines, scores).statistic)
        if not found:
            raise UserError(
                "there is nothing to compare vectors with; give the teacher, or pairs of texts with scores"
            )
        return leading_first(found, leading)

    def metric_names(self, task: Task) -> tuple[str, ...]:
        return ()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _neighbours(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The nearest documents (rows, neighbours) of each query by cosine, leaving out the one of its own row."""
    count = min(NEIGHBOURS, len(documents) - 1)
    found = []
    for start in range(0, len(queries), BLOCK):
        similarity = torch.from_numpy(queries[start : start + BLOCK] @ documents.T)
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf
        found.append(similarity.topk(count).indices)
    return torch.cat(found).numpy()


def _overlap(wanted: np.ndarray, found: np.ndarray) -> float:
    """The mean share of the wanted that is found, row by row; 1 if nothing is wanted."""
    if not wanted.shape[-1]:
        return 1.0
    return float((wanted[:, :, None] == found[:, None, :]).any(-1).mean())


def _plain_files(width: int) -> dict[str, str]:
    """The files of a folder whose vectors are the mean of all tokens, in the names of sentence-transformers 6."""
    parts = (
        ("", "base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    return {MODULES: json.dumps(modules, indent=2), "1_Pooling/config.json": json.dumps(pooling)}


EMBEDDING = Embedding()
