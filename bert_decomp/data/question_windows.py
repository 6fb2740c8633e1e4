"""Questions with long contexts as windows of token ids, each with what a span of it is in letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .batches import length_limit

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Of a window: the share that the next one repeats, and the largest that the question may take.
OVERLAP, MOST_QUESTION = 1 / 4, 1 / 3
# Room for tokens of the context that a window needs.
LEAST_CONTEXT = 2
# What is written between the accepted answers to a question.
BETWEEN = "\0"
# What a window brings beside the inputs of a model, and how the model's own labels are called.
BESIDE = ("question", "first", "last", "text", "accepted")
POSITIONS = ("start_positions", "end_positions")


def windows_of(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> dict[str, list[Any]]:
    """Windows of at most ``max_seq_length`` tokens: the question, and a part of its context that overlaps the next.

    A question may take a third of a window, and is cut there.

    Returns:
        Token ids and what else the tokenizer makes; ``question``, the question's number; ``text``, the part of the
        context; ``offset``, where in the context that begins; ``first`` and ``last`` (tokens,), where in ``text`` each
        token begins and ends, -1 for those that are not of the context.

    Raises:
        UserError: a window has no room, or the tokenizer cannot say where its tokens stand.
    """
    longest = length_limit(tokenizer, max_seq_length)
    room = longest - tokenizer.num_special_tokens_to_add(pair=True)
    asked = max(1, int(MOST_QUESTION * room))
    if room - asked < LEAST_CONTEXT:
        raise UserError(
            f"max_seq_length is {longest}, which leaves no room for question and context; give more"
        )
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer cannot say where its tokens stand in a text; give a model with tokenizer.json"
        )
    if not len(questions):
        return {name: [] for name in ("input_ids", "attention_mask", *BESIDE[:-1], "offset")}
    encoded = tokenizer(
        _cut(questions, tokenizer, asked),
        list(contexts),
        truncation="only_second",
        max_length=longest,
        stride=min(int(OVERLAP * longest), room - asked - 1),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )
    rows: dict[str, list[Any]] = {
        name: values
        for name, values in encoded.items()
        if name not in ("offset_mapping", "overflow_to_sample_mapping")
    }
    rows |= {name: [] for name in (*BESIDE[:-1], "offset")}
    for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
        places = np.array(encoded["offset_mapping"][window], np.int32).reshape(-1, 2)
        inside = np.array([part == 1 for part in encoded.sequence_ids(window)])
        begin, end = (
            (int(places[inside, 0].min()), int(places[inside, 1].max())) if inside.any() else (0, 0)
        )
        first, last = (np.where(inside, column - begin, -1) for column in places.T)
        rows["question"].append(number)
        rows["text"].append(contexts[number][begin:end])
        rows["offset"].append(begin)
        rows["first"].append(first.astype(np.int32))
        rows["last"].append(last.astype(np.int32))
    return rows


def _cut(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Questions of at most ``most`` tokens."""
    encoded = tokenizer(
        list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        text if len(places) <= most else text[: places[most - 1][1]]
        for text, places in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def encode_questions(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> Dataset:
    """The windows of all questions; with answers also ``accepted``, and the positions of the first answer.

    A window without the whole answer has both positions at its first token, as does a question without an answer.
    """

    def turn(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = windows_of(batch["question"], batch["context"], tokenizer, max_seq_length)
        offsets, within = rows.pop("offset"), rows["question"]
        rows["question"] = [numbers[number] for number in within]
        if "answers" not in batch:
            return rows
        answers = [batch["answers"][number] for number in within]
        rows["accepted"] = [BETWEEN.join(one["text"] for one in given) for given in answers]
        found = [
            _position(given[0]["start"] - offset, len(given[0]["text"]), first, last)
            if given
            else (0, 0)
            for given, offset, first, last in zip(
                answers, offsets, rows["first"], rows["last"], strict=True
            )
        ]
        for name, place in zip(POSITIONS, (0, 1), strict=True):
            rows[name] = [one[place] for one in found]
        return rows

    return data.map(
        turn,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def _position(start: int, length: int, first: np.ndarray, last: np.ndarray) -> tuple[int, int]:
    """The tokens that hold the letters from ``start`` on; (0, 0) if not all of them are in the window."""
    begins = np.flatnonzero((first >= 0) & (first <= start) & (last > start))
    ends = np.flatnonzero((first >= 0) & (first < start + length) & (last >= start + length))
    return (int(begins[0]), int(ends[-1])) if len(begins) and len(ends) else (0, 0)


@dataclass(frozen=True)
class Collator:
    """Pads windows at their end, texts as numbers of characters; -1 stands where there is nothing."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        plain = [{k: v for k, v in example.items() if k not in BESIDE} for example in examples]
        batch = dict(self.tokenizer.pad(plain, padding_side="right", return_tensors="pt"))
        for name in (name for name in BESIDE if name in examples[0]):
            values = [example[name] for example in examples]
            if name == "question":
                batch[name] = torch.tensor(values)
                continue
            if isinstance(values[0], str):
                values = [[ord(character) for character in value] for value in values]
            rows = [torch.tensor(value, dtype=torch.int32) for value in values]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=-1)
        return batch
