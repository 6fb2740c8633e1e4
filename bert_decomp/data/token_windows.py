"""Texts and sentences of words as windows of token ids that overlap, and where each of their words is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The label of what is not to be learned, by torch's convention.
IGNORED = -100
# The share of a window that the next one repeats.
OVERLAP = 0.25
# Tokens that a sentence may have: its number and the token's make one.
MOST_TOKENS = 2**20
# Sentences that are tokenized at a time.
BLOCK = 1000


class Word(NamedTuple):
    """Where a word is answered: at its first sub-word, in the window in which that is farthest from an edge.

    Attributes:
        number: of the word in its text.
        window: the row of that window.
        position: of the first sub-word there.
        start, end: of the word in its text, in characters; 0 for a text that is split into words.
    """

    number: int
    window: int
    position: int
    start: int
    end: int


def windows_of(
    texts: Sequence[str] | Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[dict[str, list[Any]], list[list[Word]]]:
    """Windows of at most ``longest`` tokens of texts, or of sentences that are split into words.

    The words of a text are what its tokenizer splits it into before it makes sub-words.

    Returns:
        Token ids and what else the tokenizer makes, a row a window; and the words of each text, in order. Words of
        which the tokenizer makes nothing are absent, and of texts those that are only space.

    Raises:
        UserError: the tokenizer cannot tell words apart.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer cannot tell which word a token is of; give a model with tokenizer.json"
        )
    if not len(texts):
        return {"input_ids": [], "attention_mask": []}, []
    split = not isinstance(texts[0], str)
    try:
        encoded = tokenizer(
            list(texts),
            is_split_into_words=split,
            truncation=True,
            max_length=longest,
            stride=int(OVERLAP * (longest - tokenizer.num_special_tokens_to_add())),
            return_overflowing_tokens=True,
            return_offsets_mapping=not split,
        )
    except AssertionError as error:
        raise UserError(
            f"the tokenizer takes no words; save it with add_prefix_space=True ({str(error).splitlines()[0]})"
        ) from error
    windows: list[list[int]] = [[] for _ in texts]
    for window, number in enumerate(encoded.pop("overflow_to_sample_mapping")):
        windows[number].append(window)
    offsets = None if split else encoded.pop("offset_mapping")
    words = []
    for text, rows in zip(texts, windows, strict=True):
        ids = [encoded.word_ids(row) for row in rows]
        places = {} if offsets is None else _offsets(text, ids, [offsets[row] for row in rows])
        words.append(
            [
                Word(number, rows[window], position, *places.get(number, (0, 0)))
                for number, (window, position) in sorted(_positions(ids).items())
                if split or number in places
            ]
        )
    return dict(encoded), words


def _positions(windows: list[list[int | None]]) -> dict[int, tuple[int, int]]:
    """For each word its window and the position of its first sub-word there: where that is farthest from an edge."""
    found: dict[int, tuple[int, int, int]] = {}
    for window, words in enumerate(windows):
        for position, word in enumerate(words):
            if word is None or (position and words[position - 1] == word):
                continue
            # What a window begins with may be the rest of a word of the one before.
            edge = min(position, len(words) - 1 - position)
            if word not in found or edge > found[word][0]:
                found[word] = (edge, window, position)
    return {word: (window, position) for word, (_, window, position) in found.items()}


def _offsets(
    text: Any, windows: list[list[int | None]], offsets: list[list[tuple[int, int]]]
) -> dict[int, tuple[int, int]]:
    """Where each word begins and ends in the text, in characters, without the words that are only space."""
    found: dict[int, tuple[int, int]] = {}
    for words, places in zip(windows, offsets, strict=True):
        for word, (start, end) in zip(words, places, strict=True):
            if word is not None:
                first, last = found.get(word, (start, end))
                found[word] = (min(first, start), max(last, end))
    # Some tokenizers count the space before a word as its own.
    bare = {
        word: (end - len(text[start:end].lstrip()), end) for word, (start, end) in found.items()
    }
    return {word: (start, end) for word, (start, end) in bare.items() if start < end}


def encode_sentences(data: Dataset, tokenizer: PreTrainedTokenizerBase, longest: int) -> Dataset:
    """Windows of at most ``longest`` tokens: ids, ``word`` and, if there are tags, ``labels``, each a list by token.

    A long sentence becomes several windows that overlap. Each word is labelled once, at its first sub-word, in the
    window in which it is farthest from an edge; ``word`` says there which word of which sentence it is, else -1.

    Raises:
        UserError: the tokenizer cannot tell words apart.
    """
    from datasets import Dataset

    tags = data["label"][:] if "label" in data.column_names else None
    rows: dict[str, list[list[int]]] = {}
    for start in range(0, len(data), BLOCK):
        encoded, places = windows_of(data[start : start + BLOCK]["tokens"], tokenizer, longest)
        which = [[-1] * len(ids) for ids in encoded["input_ids"]]
        labels = [[IGNORED] * len(ids) for ids in encoded["input_ids"]]
        for number, words in enumerate(places, start):
            for word in words:
                which[word.window][word.position] = number * MOST_TOKENS + word.number
                if tags is not None:
                    labels[word.window][word.position] = tags[number][word.number]
        beside = {"word": which} if tags is None else {"word": which, "labels": labels}
        for name, values in (encoded | beside).items():
            rows.setdefault(name, []).extend(values)
    return Dataset.from_dict(rows)
