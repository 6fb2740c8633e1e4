"""Rerankers that learn the order of a query's texts: one example is a query with all its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .reranking import Reranking

if TYPE_CHECKING:
    from datasets import Dataset

# The score of a text that is not there: it has no share in a softmax, and yet can be subtracted.
NOTHING = -1e4
# Columns of an example with one value for all its texts.
SHARED = ("query",)


@dataclass(frozen=True)
class Collator:
    """Pads the pairs of all queries of a batch; ``group`` says which belong together."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sizes = torch.tensor([len(example["input_ids"]) for example in examples])
        names = [name for name in examples[0] if name not in (*SHARED, "labels")]
        pairs = {name: [row for one in examples for row in one[name]] for name in names}
        batch = dict(self.tokenizer.pad(pairs, return_tensors="pt"))
        batch["group"] = torch.arange(len(examples)).repeat_interleave(sizes)
        for name in (name for name in SHARED if name in examples[0]):
            batch[name] = torch.tensor([one[name] for one in examples]).repeat_interleave(sizes)
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([label for one in examples for label in one["labels"]])
        return batch


@dataclass(frozen=True)
class ListwiseReranking(Reranking):
    """As ``Reranking``, but an example is a query with its texts; losses compare the shares of a softmax over these.

    A loss is the mean over pairs: a query counts as much as it has texts.
    """

    name = "listwise_reranking"
    row_per_example = False

    def recognises(self, config: Any, class_name: str | None = None) -> bool:
        """What is trained is a reranker like any other."""
        return False

    # Data

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ) -> Dataset:
        """A row a query: lists of its pairs' token ids and ``labels``, and ``query``, its number."""
        from datasets import Dataset

        pairs = super().encode(data, tokenizer, max_seq_length)
        columns = {name: pairs[name][:] for name in pairs.column_names}
        rows: dict[int, list[int]] = {}
        for row, query in enumerate(columns["query"]):
            rows.setdefault(query, []).append(row)
        return Dataset.from_dict(
            {
                name: list(rows)
                if name in SHARED
                else [[values[row] for row in of_query] for of_query in rows.values()]
                for name, values in columns.items()
            }
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return Collator(tokenizer)

    # Losses

    def compare_batch(
        self, student: Tensor, teacher: Tensor, temperature: float, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) over the texts of a query at a temperature, times its square."""
        of_student, of_teacher = (
            (_lists(x.flatten(), inputs["group"], NOTHING) / temperature).log_softmax(-1)
            for x in (student, teacher)
        )
        divergence = F.kl_div(of_student, of_teacher, log_target=True, reduction="none").sum(-1)
        return _over_pairs(divergence, inputs["group"]) * temperature**2

    def task_loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Softmax cross-entropy against the labels' shares of their sum, a bound on MRR and NDCG (Bruch et al., ICTIR
        2019). A query without a relevant text has none."""
        if "labels" not in inputs:
            return None
        logs = _lists(outputs.logits.flatten(), inputs["group"], NOTHING).log_softmax(-1)
        labels = _lists(inputs["labels"].to(logs.dtype), inputs["group"], 0.0)
        shares = labels / labels.sum(-1, keepdim=True).clamp_min(1e-12)
        return _over_pairs(-(shares * logs).sum(-1), inputs["group"])


def _sizes(group: Tensor) -> Tensor:
    return torch.unique_consecutive(group, return_counts=True)[1]


def _lists(values: Tensor, group: Tensor, filling: float) -> Tensor:
    """Values of pairs (pairs,) as (groups, most), each group's beside each other, filled up."""
    parts = values.split(_sizes(group).tolist())
    return pad_sequence(parts, batch_first=True, padding_value=filling)


def _over_pairs(losses: Tensor, group: Tensor) -> Tensor:
    """The mean over pairs of what each group has lost (groups,)."""
    sizes = _sizes(group)
    return (losses * sizes).sum() / sizes.sum()


LISTWISE_RERANKING = ListwiseReranking()
