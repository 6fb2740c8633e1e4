"""What the labels of a file become: class numbers, rows of 0 and 1, or scores, by a model's labels if there is one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from ..errors import UserError
from .examples import Examples
from .label_sets import indicators
from .labels import Labels, class_order, classes, is_scores, scores
from .model_labels import MULTI_LABEL, ModelLabels

Numbering = Callable[[Examples], Labels]


def numbering(source: Examples, model: ModelLabels | None, problem_type: str | None) -> Numbering:
    """The function that numbers a file's labels, decided by the labels of ``source``.

    Raises:
        UserError: some have lists of labels where one is needed, or the other way round.
    """
    number = _numbering_of(source, model, problem_type)

    def checked(examples: Examples) -> Labels:
        if examples.several != source.several:
            one, other = (examples, source) if source.several else (source, examples)
            raise UserError(f"{one.path} has one label a row, but {other.path} lists of labels")
        return number(examples)

    return checked


def _numbering_of(
    source: Examples, model: ModelLabels | None, problem_type: str | None
) -> Numbering:
    values = source.labels or []
    if is_multi_label(source, model, problem_type):
        return _numbering_of_sets(source, model)
    if is_scores(values, model, problem_type):
        return lambda examples: scores(examples.path, examples.labels or [])
    if model is not None:
        return lambda examples: _by_model(examples, model)
    names = source.label_names or class_order(values, source.path)
    if len(names) < 2:
        raise UserError(
            f"{source.path} has only the label {names[0]!r}; at least two classes are needed"
        )
    return lambda examples: classes(
        examples.path, examples.labels or [], names, f"{source.path} lacks", by_index=False
    )


def is_multi_label(source: Examples, model: ModelLabels | None, problem_type: str | None) -> bool:
    """Whether rows of ``source`` have sets of labels, as the model or ``problem_type`` wants it.

    Raises:
        UserError: they have not what is wanted.
    """
    wanted = problem_type if model is None else model.problem_type
    if wanted is None:
        return source.several
    if source.several and wanted != MULTI_LABEL:
        raise UserError(
            f"{source.path} has lists of labels, for multi-label classification, but "
            f"{'the model has' if model else 'problem_type asks for'} one label an example"
        )
    if wanted == MULTI_LABEL and not source.several:
        raise UserError(
            f"{source.path} has one label a row; for multi-label classification give lists in JSON-lines or Parquet, "
            "or name several columns of 0 and 1 with label_column_name, separated by commas"
        )
    return wanted == MULTI_LABEL


def _numbering_of_sets(source: Examples, model: ModelLabels | None) -> Numbering:
    """The function that makes rows of 0 and 1 of a file's sets of labels."""
    values = list(chain.from_iterable(source.labels or []))
    if model is not None:
        names, lacks = model.names or tuple(map(str, range(model.count))), "the model lacks"
    else:
        names = source.label_names or class_order(values, source.path)
        lacks = f"{source.path} lacks"
    if not names:
        raise UserError(f"{source.path} has no label in any row; give examples that have some")
    by_index = model is not None
    return lambda examples: indicators(examples.path, examples.labels or [], names, lacks, by_index)


def _by_model(examples: Examples, model: ModelLabels) -> Labels:
    """A file's labels as the classes of a model."""
    path, values, lacks = examples.path, examples.labels or [], "the model lacks"
    if model.names is not None:
        return classes(path, values, model.names, lacks, by_index=True)
    if examples.label_names is not None and len(examples.label_names) == model.count:
        return classes(path, values, examples.label_names, lacks, by_index=False)
    return classes(
        path,
        values,
        tuple(map(str, range(model.count))),
        lacks,
        by_index=True,
        advice="the model's classes have no names, so write these numbers, or the names into id2label of its "
        "config.json",
    )
