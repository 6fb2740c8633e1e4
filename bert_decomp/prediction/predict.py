"""Predictions for every text of a file, of any size, in a job that can be killed and started again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.demo import resolve_model
from ..data.windows import TextSource, Window
from ..errors import UserError
from ..io.atomic import exclusive_lock
from ..kinds import SINGLE_LABEL
from ..models.folders import fingerprint_of_checkpoint
from .answers import answers_of
from .engines import find_engine
from .outputs import FORMATS
from .predictor import BATCH_TOKENS, CALIBRATION, check_calibration
from .shards import Shards
from .workers import Work

logger = logging.getLogger("bert_decomp")


@dataclass(frozen=True)
class Prediction:
    """What a job did: rows of the output, and the texts, tokens and seconds of this run, without loading the model."""

    rows: int
    texts: int
    tokens: int
    seconds: float


def predict(
    folder: str,
    path: str,
    output: str | Path,
    *,
    text_column_names: Sequence[str] | None = None,
    keep_columns: Sequence[str] = (),
    max_seq_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    int8: bool = False,
    version_2_with_negative: bool = False,
    processes: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    progress: bool = True,
) -> Prediction:
    """Answer every text of a file and write the answers as Parquet or JSON-lines, one row a text, in the file's order.

    The columns: ``label``, ``score`` and ``scores`` of a classifier (probabilities), ``labels`` and ``scores`` of one
    that gives several labels, ``score`` of a regression, ``embedding`` of an encoder of sentence-transformers,
    ``entities`` of a token classifier (``tags`` and ``scores`` if texts are lists of words), ``answer``, ``start``,
    ``end`` and ``score`` of a model for question answering.

    >>> import tempfile
    >>> import pandas
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "texts.csv").write_text("text\\nHow far is it?\\nWhy?\\n")
    25
    >>> predict("all-MiniLM-L6-v2", str(folder / "texts.csv"), folder / "answers.parquet", progress=False).rows
    2
    >>> list(pandas.read_parquet(folder / "answers.parquet").columns)
    ['embedding']

    A run that is stopped, however, continues when it is started again with the same arguments; the number of
    processes and the engine may differ.

    Args:
        folder: a saved model: dense, low-rank, or in int8.
        path: CSV, JSON-lines or Parquet, or a folder of datasets' ``save_to_disk``; it may be larger than memory.
        output: the file to write; its name ends in ``.parquet`` or ``.jsonl``.
        text_column_names: one or two columns; chosen by their names or their content if left out.
        keep_columns: columns of the input that go into the output, before the answers; ("all",) for every one.
        max_seq_length: tokens to which texts are cut, or of the windows that long texts become where answers are places
            in them; None for as many as the model takes.
        batch_tokens: tokens of a batch, padding included.
        int8: compute in 8 bits, calibrated on the first texts.
        version_2_with_negative: a question may have no answer, as in SQuAD 2, also where the model's config does not
            say so.
        processes: each has a model of its own.
        engine: what they are: "local" for processes of this machine, "ray" for actors of Ray.
        ray_address: HOST:PORT of a Ray cluster, or "auto" for that of this machine; None for the one that this process
            is connected to, else that of ``RAY_ADDRESS``, else one that is started here for this job.

    Raises:
        UserError: an input cannot be used, or the output belongs to another job.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise UserError(
            f"{output} ends in {output.suffix!r}; give a name that ends in {' or '.join(FORMATS)}"
        )
    answer = partial(
        find_engine(engine, ray_address).answer, processes=processes, address=ray_address
    )
    answers = answers_of(folder, version_2_with_negative)
    check_calibration(folder, int8)
    choose = (answers.windowed or SINGLE_LABEL).text_columns
    source = TextSource.open(path, text_column_names, keep_columns, choose)
    answers = answers.of_words() if source.words else answers
    logger.info("texts: %s, column %s", path, " and ".join(map(repr, source.text_columns)))
    twice = set(answers.column_names()) & set(source.keep)
    if twice:
        raise UserError(
            f"{path}: the column {min(twice)!r} to keep has the name of an answer; rename it"
        )
    settings = {
        "input": source.digest(),
        "model": fingerprint_of_checkpoint(resolve_model(folder)),
        "answers": repr(answers),
        "text_column_names": list(source.text_columns),
        "keep_columns": list(source.keep),
        "max_seq_length": max_seq_length,
        "batch_tokens": batch_tokens,
        "int8": int8,
        "version_2_with_negative": version_2_with_negative,
    }
    shards = Shards(output, settings)
    rows = shards.finished()
    if rows is not None:
        return Prediction(rows, 0, 0, 0.0)
    source = source.checked()
    with exclusive_lock(shards.folder):
        # Another run may have finished in the meantime.
        rows = shards.finished()
        if rows is not None:
            return Prediction(rows, 0, 0, 0.0)
        shards.open()
        return _run(folder, source, shards, answer, processes, progress)


def _run(
    folder: str,
    source: TextSource,
    shards: Shards,
    answer: Callable[..., None],
    processes: int,
    progress: bool,
) -> Prediction:
    settings = shards.settings
    calibration = None
    if settings["int8"]:
        first = next(source.windows())
        calibration = [column[:CALIBRATION] for column in first.texts]
    work = Work(
        shards,
        max(1, torch.get_num_threads() // processes),
        {
            "folder": folder,
            "calibration": calibration,
            **{
                name: settings[name]
                for name in ("max_seq_length", "batch_tokens", "version_2_with_negative")
            },
        },
    )
    texts = tokens = 0
    start = 0.0
    done: list[int] = []
    with tqdm(total=source.rows, unit=" texts", disable=not progress, smoothing=0.1) as bar:

        def report(new_texts: int, new_tokens: int) -> None:
            nonlocal texts, tokens, start
            start = start or time.perf_counter()
            texts, tokens = texts + new_texts, tokens + new_tokens
            bar.update(new_texts)

        def todo() -> Iterator[Window]:
            for window in source.windows():
                done.append(len(window))
                if shards.has(window.number, len(window)):
                    bar.update(len(window))
                else:
                    yield window

        answer(work, todo(), report)
    seconds = time.perf_counter() - start if start else 0.0
    shards.join(done)
    return Prediction(source.rows, texts, tokens, seconds)
