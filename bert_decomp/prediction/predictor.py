"""A saved model in its fastest form, as a function of texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import LONGEST_TOKEN, length_limit
from ..errors import UserError
from ..models.folders import is_int8
from ..models.loading import load_encoder, load_model, load_tokenizer
from ..runtime import fuse_, has_form
from .answers import answers_of

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("bert_decomp")

# Tokens of a batch, padding included: benchmarks/predict.py has the speed at other budgets.
BATCH_TOKENS = 4096
# Texts that calibrate int8.
CALIBRATION = 256
# Called with texts and tokens that are done.
Report = Callable[[int, int], None]


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows from the shortest to the longest, cut into batches of at most ``budget`` tokens, padding included.

    A row of more tokens is a batch by itself.

    >>> token_batches([5, 2, 9, 2], 15)
    [[1, 3, 0], [2]]
    >>> token_batches([5, 2, 9, 2], 9)
    [[1, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def check_calibration(folder: str, wanted: bool) -> None:
    """Raise UserError if int8 is ``wanted`` of a folder that is int8 already."""
    if wanted and is_int8(folder):
        raise UserError(
            f"{folder} is int8 already, calibrated when it was written; leave int8 and its texts out"
        )


class Predictor:
    """A model of a folder, fused, with its tokenizer.

    Args:
        folder: a saved model of any kind with a head, or an encoder in the layout of sentence-transformers; dense,
            low-rank or int8.
        max_seq_length: tokens to which texts are cut, or of a window where answers are places in texts; None for as
            many as the model takes.
        batch_tokens: tokens of a batch, padding included.
        calibration: texts that int8 is calibrated on, one or two lists as in ``__call__``; None for float32, or for a
            folder that is int8 already.
        version_2_with_negative: a question may have no answer, as in SQuAD 2, also where the config does not say so.
        device: where it runs; None for a GPU if there is one (never with int8).

    Raises:
        UserError: the folder holds no such model, or it cannot be int8.

    Example:
        >>> predictor = Predictor("all-MiniLM-L6-v2")
        >>> predictor(["How far is it?", "Why?"]).shape
        (2, 384)
    """

    def __init__(
        self,
        folder: str,
        *,
        max_seq_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        calibration: Sequence[Sequence[Any]] | None = None,
        version_2_with_negative: bool = False,
        device: str | None = None,
    ):
        self.answers = answers_of(folder, version_2_with_negative)
        check_calibration(folder, calibration is not None)
        pooling = self.answers.pooling
        self.tokenizer = load_tokenizer(folder)
        limits = [max_seq_length, pooling.max_length if pooling else None]
        self.max_length = length_limit(
            self.tokenizer, min([limit for limit in limits if limit] or [2**31])
        )
        self.batch_tokens = batch_tokens
        self.windowed = self.answers.windowed
        if self.windowed is not None:
            # Whether there is room for a window is said now, and not at the first text.
            self.windows([[], []])
        model = load_model(folder) if pooling is None else load_encoder(folder)
        if device is None:
            int8 = calibration is not None or is_int8(folder)
            device = "cuda" if torch.cuda.is_available() and not int8 else "cpu"
        self.device = torch.device(device)
        self.model = self._fused(model.eval().to(self.device), calibration)

    def _fused(
        self, model: PreTrainedModel, calibration: Sequence[Sequence[Any]] | None
    ) -> PreTrainedModel:
        if calibration is not None:
            texts = [column[:CALIBRATION] for column in calibration]
            encoded = self.encode(texts) if self.windowed is None else self.windows(texts)[0]
            groups = token_batches(self.lengths(encoded), self.batch_tokens)
            return fuse_(
                model, dtype="int8", calibration=[self._batch(encoded, rows) for rows in groups]
            )
        # Most requests are small, and their launches take a GPU's host longer than the GPU.
        graphs = "auto" if self.device.type == "cuda" and has_form(model) else ()
        try:
            return fuse_(model, graphs=graphs)
        except UserError as error:
            logger.info("not fused: %s", error)
            return model

    def encode(
        self, texts: Sequence[Sequence[str]], limit: int | None = None
    ) -> dict[str, list[list[int]]]:
        """Token ids of texts, or of pairs of texts from two lists, and what else the model takes; not padded.

        Texts are cut to ``limit`` tokens, or to ``max_length``.
        """
        limit = limit or self.max_length
        letters = limit * LONGEST_TOKEN
        prompt = self.answers.pooling.prompt if self.answers.pooling else ""
        columns = [[prompt + text[:letters] for text in column] for column in texts]
        return dict(self.tokenizer(*columns, truncation=True, max_length=limit))

    def windows(self, texts: Sequence[Sequence[Any]]) -> tuple[dict[str, list[list[int]]], Any]:
        """Token ids of the windows of texts, not padded, and what ``found`` must know of them.

        Raises:
            UserError: the model's answers are not places in texts, or there is no room for a window.
        """
        if self.windowed is None:
            raise UserError("the model answers texts as a whole")
        return self.windowed.windows(texts, self.tokenizer, self.max_length)

    def found(
        self, outputs: Sequence[np.ndarray], places: Any, texts: Sequence[Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """What the outputs of all windows say, a dict of plain values for each text; see ``Kind.found``."""
        assert self.windowed is not None
        return self.windowed.found(outputs, places, texts)

    @staticmethod
    def lengths(encoded: dict[str, list[list[int]]]) -> list[int]:
        """Tokens of each text or window."""
        return [len(ids) for ids in encoded["input_ids"]]

    def _batch(self, encoded: dict[str, list[list[int]]], rows: Sequence[int]) -> dict[str, Tensor]:
        chosen = {name: [values[row] for row in rows] for name, values in encoded.items()}
        padded = self.tokenizer.pad(chosen, padding_side="right", return_tensors="pt")
        return {name: value.to(self.device) for name, value in padded.items()}

    @torch.inference_mode()
    def outputs(self, encoded: dict[str, list[list[int]]], rows: Sequence[int]) -> list[np.ndarray]:
        """The model's outputs in float32 for some of the encoded texts, as one batch: for each row (width,), or
        (tokens, width) where answers are places in texts."""
        batch = self._batch(encoded, rows)
        result: Any = self.model(**batch)
        if self.answers.pooling is not None:
            values = self.answers.pooling(result.last_hidden_state, batch["attention_mask"])
        elif self.windowed is not None:
            values = self.windowed.raw(result)
        else:
            values = result.logits
        found = list(values.float().cpu().numpy())
        if self.windowed is None:
            return found
        return [one[: len(encoded["input_ids"][row])] for one, row in zip(found, rows, strict=True)]

    def _all_outputs(self, encoded: dict[str, list[list[int]]], report: Report) -> list[np.ndarray]:
        """``outputs`` of all encoded rows, in batches; ``report`` is called with rows and tokens of each.

        Raises:
            UserError: an output is not finite.
        """
        lengths = self.lengths(encoded)
        result: list[Any] = [None] * len(lengths)
        for rows in token_batches(lengths, self.batch_tokens):
            for row, values in zip(rows, self.outputs(encoded, rows), strict=True):
                if not np.isfinite(values).all():
                    raise UserError(
                        "the model gives numbers that are not finite; check its weights"
                    )
                result[row] = values
            report(len(rows), sum(lengths[row] for row in rows))
        return result

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        report: Report | None = None,
    ) -> np.ndarray:
        """Outputs (texts, width) in float32: logits, scores or vectors, in the order of the texts.

        Args:
            pairs: the second text of each, for models of pairs.
            report: called after each batch with its texts and its tokens without padding.

        Raises:
            UserError: an output is not finite, or the model's answers are places in texts (see ``columns``).
        """
        if self.windowed is not None:
            raise UserError("the model's answers are places in texts; take them from columns()")
        result = np.empty((len(texts), self.answers.width), np.float32)
        if len(texts):
            encoded = self.encode([texts] if pairs is None else [texts, pairs])
            result[:] = self._all_outputs(encoded, report or _ignore)
        return result

    def columns(
        self,
        texts: Sequence[Any],
        pairs: Sequence[str] | None = None,
        report: Report | None = None,
    ) -> dict[str, pa.Array]:
        """The answers as columns (pyarrow) by name, a row a text; see ``predict``.

        >>> predictor = Predictor("all-MiniLM-L6-v2")
        >>> list(predictor.columns(["Why?"]))
        ['embedding']

        Args:
            texts: of a model for token classification they may be lists of words.
            pairs: the second text of each, for models of pairs; contexts, for questions.
            report: called with texts and tokens (without padding) that are done.

        Raises:
            UserError: an output is not finite, or texts and pairs are not what the model needs.
        """
        if self.windowed is None:
            return self.answers.columns(self(texts, pairs, report))
        report = report or _ignore
        given = [texts] if pairs is None else [texts, pairs]
        encoded, places = self.windows(given)
        outputs = self._all_outputs(encoded, lambda _, tokens: report(0, tokens))
        rows = self.found(outputs, places, given)
        report(len(texts), 0)
        split = len(texts) > 0 and not isinstance(texts[0], str)
        return (self.answers.of_words() if split else self.answers).columns_of_rows(rows)


def _ignore(texts: int, tokens: int) -> None:
    pass
