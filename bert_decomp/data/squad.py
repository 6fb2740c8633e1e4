"""SQuAD's JSON: articles of paragraphs, each with its questions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .guards import check_json
from .pieces import Piece, json_pieces
from .table import Table, decoded
from .tables import check_present

QUESTION, CONTEXT, ANSWERS = "question", "context", "answers"
# How a file in SQuAD's form begins, and in how many bytes.
SQUAD, HEAD = re.compile(rb"(\xef\xbb\xbf)?\s*\{\s*\"(version|data)\"\s*:"), 1000


@dataclass(frozen=True)
class Question:
    """One question: ``answers`` are pairs of a text and its first character; None if the file says nothing of them."""

    place: str
    name: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None

    @property
    def fits(self) -> bool:
        """Whether every answer stands where the file says."""
        return all(
            self.context[start : start + len(text)] == text and start >= 0
            for text, start in self.answers or []
        )


def squad_data(path: str) -> list[Any] | None:
    """The contents of a file in SQuAD's form; None for a file of rows.

    Raises:
        UserError: the file cannot be read.
    """
    if Path(path).suffix.lower() != ".json":
        return None
    check_present(path)
    check_json(path, flat=False)
    text, _ = decoded(path)
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None  # JSON-lines, or damaged, which the reader of rows says
    data = value.get("data") if isinstance(value, dict) else None
    return data if isinstance(data, list) else None


def squad_or_rows(
    path: str, rows: int, size: int, names: Sequence[str] | None = None
) -> Iterator[Piece]:
    """A ``.json`` file: the questions of one in SQuAD's form (``id``, ``question``, ``context``), which is read whole,
    else the rows of JSON-lines.

    Raises:
        UserError: it is neither.
    """
    with Path(path).open("rb") as file:
        data = squad_data(path) if SQUAD.match(file.read(HEAD)) else None
    if data is None:
        yield from json_pieces(path, rows, size, names)
        return
    held: list[Question] = []
    first = 1
    filled = 0

    def piece() -> Piece:
        columns = {
            "id": [question.name for question in held],
            QUESTION: [question.question for question in held],
            CONTEXT: [question.context for question in held],
        }
        kept = columns if names is None else {name: columns[name] for name in names}
        return Piece(Table(path, "SQuAD", kept, first=first))

    for question in questions_of(path, data):
        held.append(question)
        filled += len(question.question) + len(question.context)
        if len(held) == rows or filled >= size:
            yield piece()
            first += len(held)
            held, filled = [], 0
    if held:
        yield piece()


def questions_of(path: str, data: list[Any]) -> Iterator[Question]:
    """The questions in what ``squad_data`` gave.

    Raises:
        UserError: a part is missing or of another type; it is named.
    """

    def part(value: Any, name: str, kind: Any, place: str) -> Any:
        found = value.get(name) if isinstance(value, dict) else None
        if not isinstance(found, kind):
            raise UserError(
                f"{path}: {place} has no {name!r} as SQuAD's files have it; correct the file"
            )
        return found

    for index, article in enumerate(data):
        place = f"data[{index}]"
        for number, paragraph in enumerate(part(article, "paragraphs", list, place)):
            inside = f"{place}.paragraphs[{number}]"
            context = part(paragraph, CONTEXT, str, inside)
            for count, item in enumerate(part(paragraph, "qas", list, inside)):
                where = f"{inside}.qas[{count}]"
                name = str(part(item, "id", (str, int), where))
                question = part(item, QUESTION, str, where)
                answers = None
                if ANSWERS in item or item.get("is_impossible"):
                    answers = answers_of(path, where, item.get(ANSWERS, []))
                    if bool(answers) == bool(item.get("is_impossible", False)):
                        what = "answers but is" if answers else "no answers but is not"
                        raise UserError(
                            f"{path}: the question {name!r} has {what} marked is_impossible; correct the file"
                        )
                yield Question(where, name, question, context, answers)


def answers_of(path: str, place: str, value: Any) -> list[tuple[str, int]]:
    """Answers as SQuAD writes them, a list of objects, or as the hub does, an object of lists.

    Raises:
        UserError: they are neither; ``place`` is named.
    """
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list):
        whole = [one if isinstance(one, dict) else {} for one in value]
        pairs = [(one.get("text"), one.get("answer_start")) for one in whole]
    if not all(
        type(text) is str and text.strip() and "\0" not in text and type(start) is int
        for text, start in pairs
    ):
        raise UserError(
            f"{path}: {place}: each answer needs a text and the number of its first character, answer_start; correct "
            "the file"
        )
    return pairs
