"""Turning text into token ids and padded batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# Tokens that go through a model at once on a CPU where gradients are wanted. What is kept for the backward pass grows
# with them and is soon larger than the model, and a CPU is no faster with more.
SLICE_TOKENS = 512
# Letters that a token stands for at the very most: a tokenizer takes some 500 bytes a token before it cuts.
LONGEST_TOKEN = 1000


def length_limit(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> int:
    """Tokens to which inputs are cut: ``max_seq_length``, or fewer where the model takes no more."""
    return int(min(max_seq_length, tokenizer.model_max_length))


def encode(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Turn texts into token ids (with every input the tokenizer makes) and, if they have labels, ``labels``.

    Texts are cut at ``max_seq_length``, or sooner where the model takes no more.
    """
    longest = length_limit(tokenizer, max_seq_length)
    letters = longest * LONGEST_TOKEN

    def turn(batch: dict[str, list]) -> dict[str, list]:
        texts = [
            [text[:letters] for text in batch[name]]
            for name in ("text", "text_pair")
            if name in batch
        ]
        labels = {"labels": batch["label"]} if "label" in batch else {}
        return {**tokenizer(*texts, truncation=True, max_length=longest), **labels}

    # No file cache: these tables are small, and a run must not depend on what an earlier one left somewhere.
    return data.map(
        turn,
        batched=True,
        remove_columns=data.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def length_order(data: Dataset) -> list[int]:
    """The examples' numbers from the shortest to the longest."""
    lengths = [len(ids) for ids in data["input_ids"]]
    return sorted(range(len(data)), key=lengths.__getitem__)


def batches(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, collate: Any = None
) -> list[dict[str, torch.Tensor]]:
    """All examples as padded batches in ``length_order``, so that little of them is padding.

    Args:
        collate: makes a batch of examples; a ``DataCollatorWithPadding`` if None.
    """
    from transformers import DataCollatorWithPadding

    collate, order = collate or DataCollatorWithPadding(tokenizer), length_order(data)
    return [
        collate([data[i] for i in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    ]


def slices(batch: Mapping[str, torch.Tensor], tokens: int) -> list[dict[str, torch.Tensor]]:
    """A padded batch in runs of whole sentences, as even as can be, of at most ``tokens`` tokens, padding counted.

    A sentence that is longer is a run by itself. Rows of one ``group`` stay in one run.

    >>> import torch
    >>> [len(run["input_ids"]) for run in slices({"input_ids": torch.zeros(7, 10, dtype=torch.long)}, 34)]
    [3, 3, 1]
    """
    sentences, length = batch["input_ids"].shape
    if "group" in batch:
        return _slices_of_groups(batch, tokens)
    runs = math.ceil(sentences / max(1, tokens // max(length, 1)))
    rows = math.ceil(sentences / max(runs, 1)) or 1
    parts = {name: value.split(rows) for name, value in batch.items()}
    return [
        {name: part[index] for name, part in parts.items()}
        for index in range(len(parts["input_ids"]))
    ]


def _slices_of_groups(
    batch: Mapping[str, torch.Tensor], tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Runs of whole groups, of at most ``tokens`` tokens unless one group has more."""
    import torch

    length = batch["input_ids"].shape[1]
    sizes: list[int] = []
    for size in torch.unique_consecutive(batch["group"], return_counts=True)[1].tolist():
        if sizes and (sizes[-1] + size) * length <= tokens:
            sizes[-1] += size
        else:
            sizes.append(size)
    parts = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(sizes))]
