"""Questions with their answers in a text: SQuAD's JSON, or rows as data sets of the hub have them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import columns
from .columns import find_column
from .files import hold_out_groups
from .guards import check_json
from .pieces import Piece, json_pieces
from .schema import Reading
from .table import Table, decoded, named_rows
from .tables import check_present, read_table
from .task import Task, name_of_files

if TYPE_CHECKING:
    from datasets import Dataset

QUESTION, CONTEXT, ANSWERS = "question", "context", "answers"
# How a file in SQuAD's form begins, and in how many bytes.
SQUAD, HEAD = re.compile(rb"(\xef\xbb\xbf)?\s*\{\s*\"(version|data)\"\s*:"), 1000


@dataclass(frozen=True)
class _Question:
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


def read_questions(
    path: str, text_column_names: Sequence[str] | None = None, label_column_name: str = "label"
) -> tuple[Dataset, Reading]:
    """One file as ``question``, ``context`` and, if it has answers, ``answers``: a list of ``text`` and ``start`` each.

    An empty list stands for a question without an answer. A question whose answer does not stand at ``answer_start`` is
    left out, counted and named.

    Args:
        text_column_names: of rows, the columns of question and context.
        label_column_name: of rows, the column of answers; "label" for ``answers``.

    Raises:
        UserError: the file cannot be used.
    """
    data = _squad(path)
    if data is not None:
        found = list(_questions_of(path, data))
        reading = Reading(path, len(found), "SQuAD", (QUESTION, CONTEXT), ANSWERS)
    else:
        found, reading = _rows(path, text_column_names, label_column_name)
    if not found:
        raise UserError(f"{path} holds no questions; give a file with questions")
    _check(path, found)
    with_answers = [question for question in found if question.answers is not None]
    if with_answers and len(with_answers) < len(found):
        lacks = [question.place for question in found if question.answers is None]
        raise UserError(
            f"{path}: {_named(lacks)} without answers; give every question a list of them, empty if there is none"
        )
    kept = [question for question in found if question.fits]
    wrong = [repr(question.name) for question in found if not question.fits]
    if len(wrong) > len(found) / 2:
        raise UserError(
            f"{path}: {len(wrong)} of {len(found)} answers do not stand at answer_start ({_named(wrong)}); count "
            "characters, not bytes, from 0"
        )
    notes = (f"answers that do not stand at answer_start: {_named(wrong)}",) if wrong else ()
    label = reading.label_column if with_answers else None
    reading = replace(reading, label_column=label, notes=reading.notes + notes)
    reading = reading.without(len(wrong), "whose answer does not stand at answer_start")
    return _dataset(kept, bool(with_answers)), reading


def load_questions(
    train_file: str,
    validation_file: str | None,
    text_column_names: Sequence[str] | None,
    label_column_name: str,
    kind: str,
) -> Task:
    """Read a task of questions; training questions may lack answers if a validation file has them.

    Raises:
        UserError: a file cannot be used.
    """
    train, reading = read_questions(train_file, text_column_names, label_column_name)
    if validation_file is not None:
        held_out, of_held_out = read_questions(
            validation_file, text_column_names, label_column_name
        )
        readings = {"train": reading, "validation": of_held_out}
    else:
        train, held_out, readings = hold_out_groups(train, train[CONTEXT], reading, "context")
    check_answered(held_out, readings["validation"])
    name = name_of_files(train_file)
    return Task(name, train, held_out, None, readings=readings, kind=kind)


def check_answered(data: Dataset, reading: Reading) -> None:
    """Raise UserError if the questions, by which a model is to be judged, have no answers."""
    if ANSWERS not in data.column_names:
        raise UserError(f"{reading.source} has no answers; give a file with answers to evaluate on")


def text_columns(table: Table, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The columns of question and context.

    Raises:
        UserError: there are none.
    """
    if names is None and all(find_column(table, name) for name in (QUESTION, CONTEXT)):
        names = (QUESTION, CONTEXT)
    found = columns.unlabelled_columns(table, names)
    if len(found) < 2:
        raise UserError(
            f"{table.path}: a question and its context are needed, not {found[0]!r} alone; name both columns with "
            "text_column_names"
        )
    return found


def _squad(path: str) -> list[Any] | None:
    """The contents of a file in SQuAD's form; None for a file of rows."""
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
        data = _squad(path) if SQUAD.match(file.read(HEAD)) else None
    if data is None:
        yield from json_pieces(path, rows, size, names)
        return
    held: list[_Question] = []
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

    for question in _questions_of(path, data):
        held.append(question)
        filled += len(question.question) + len(question.context)
        if len(held) == rows or filled >= size:
            yield piece()
            first += len(held)
            held, filled = [], 0
    if held:
        yield piece()


def _questions_of(path: str, data: list[Any]) -> Iterator[_Question]:
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
                    answers = _answers(path, where, item.get(ANSWERS, []))
                    if bool(answers) == bool(item.get("is_impossible", False)):
                        what = "answers but is" if answers else "no answers but is not"
                        raise UserError(
                            f"{path}: the question {name!r} has {what} marked is_impossible; correct the file"
                        )
                yield _Question(where, name, question, context, answers)


def _rows(
    path: str, names: Sequence[str] | None, label_column_name: str
) -> tuple[list[_Question], Reading]:
    table = read_table(path)
    columns = [find_column(table, name) for name in names or (QUESTION, CONTEXT)]
    if len(columns) != 2 or None in columns:
        raise UserError(
            f"{path}: a column of questions and one of contexts are needed; it has {', '.join(table.columns)}: name "
            "both with text_column_names, or give a file in SQuAD's form"
        )
    wanted = ANSWERS if label_column_name == "label" else label_column_name
    label, key = find_column(table, wanted), find_column(table, "id")
    found = []
    for row in range(len(table)):
        place = table.where([row])
        asked, context = (table.columns[str(column)][row] for column in columns)
        if not (isinstance(asked, str) and isinstance(context, str)):
            raise UserError(f"{path}: {place}: question and context must be text; correct the file")
        value = None if label is None else table.columns[label][row]
        answers = None if value is None else _answers(path, place, value)
        name = str(row if key is None else table.columns[key][row])
        found.append(_Question(place, name, asked, context, answers))
    taken = (*columns, label, key)
    unused = tuple(column for column in table.columns if column not in taken)
    texts = tuple(map(str, columns))
    return found, Reading(path, len(found), table.layout, texts, label, unused, notes=table.notes)


def _answers(path: str, place: str, value: Any) -> list[tuple[str, int]]:
    """Answers as SQuAD writes them, a list of objects, or as the hub does, an object of lists."""
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


def _check(path: str, found: list[_Question]) -> None:
    """Raise UserError if questions share an id, or a text is empty or no text."""
    names: set[str] = set()
    for question in found:
        if question.name in names:
            raise UserError(
                f"{path} has two questions with the id {question.name!r}; give each its own"
            )
        names.add(question.name)
        for what, text in ((QUESTION, question.question), (CONTEXT, question.context)):
            if not text.strip():
                raise UserError(f"{path}: {question.place}: the {what} is empty; remove it")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{path}: {question.place}: the {what} holds what is no character ({error.reason}); remove it"
                ) from error


def _named(places: list[str]) -> str:
    return named_rows(places, "question")


def _dataset(found: list[_Question], answered: bool) -> Dataset:
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[Any]] = {
        QUESTION: [question.question for question in found],
        CONTEXT: [question.context for question in found],
    }
    features: dict[str, Any] = {name: Value("string") for name in columns}
    if answered:
        columns[ANSWERS] = [
            [{"text": text, "start": start} for text, start in question.answers or []]
            for question in found
        ]
        features[ANSWERS] = List({"text": Value("string"), "start": Value("int64")})
    return Dataset.from_dict(columns, features=Features(features))
