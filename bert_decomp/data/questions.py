"""Questions with their answers in a text: SQuAD's JSON, or rows as data sets of the hub have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import columns
from .columns import find_column
from .files import hold_out_groups
from .schema import Reading
from .squad import ANSWERS, CONTEXT, QUESTION, Question, answers_of, questions_of, squad_data
from .table import Table, named_rows
from .tables import read_table
from .task import Task, name_of_files

if TYPE_CHECKING:
    from datasets import Dataset


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
    data = squad_data(path)
    if data is not None:
        found = list(questions_of(path, data))
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


def _rows(
    path: str, names: Sequence[str] | None, label_column_name: str
) -> tuple[list[Question], Reading]:
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
        answers = None if value is None else answers_of(path, place, value)
        name = str(row if key is None else table.columns[key][row])
        found.append(Question(place, name, asked, context, answers))
    taken = (*columns, label, key)
    unused = tuple(column for column in table.columns if column not in taken)
    texts = tuple(map(str, columns))
    return found, Reading(path, len(found), table.layout, texts, label, unused, notes=table.notes)


def _check(path: str, found: list[Question]) -> None:
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


def _dataset(found: list[Question], answered: bool) -> Dataset:
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
