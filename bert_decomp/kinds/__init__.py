"""Kinds of task: what the stages must know of one is one object, in one file each, and a row of ``KINDS``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError
from .embedding import EMBEDDING
from .kind import Kind, model_inputs
from .listwise import LISTWISE_RERANKING
from .multi_label import MULTI_LABEL
from .question_answering import QUESTION_ANSWERING
from .regression import REGRESSION
from .reranking import RERANKING, is_cross_encoder
from .single_label import SINGLE_LABEL
from .token_classification import TOKEN_CLASSIFICATION

# By the name that ``problem_type`` gives it. A checkpoint is of the first kind that recognises it.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        MULTI_LABEL,
        RERANKING,
        LISTWISE_RERANKING,
        REGRESSION,
        SINGLE_LABEL,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        EMBEDDING,
    )
}


def register_kind(kind: Kind) -> None:
    """Make a kind of task known under its name, before those that are there.

    Example:
        >>> class Graded(type(SINGLE_LABEL)):
        ...     name = "graded"
        ...     head = "ForGrades"
        >>> register_kind(Graded())
        >>> next(iter(KINDS))
        'graded'
        >>> del KINDS["graded"]

    Raises:
        UserError: there is one of that name.
    """
    if kind.name in KINDS:
        raise UserError(f"there is a kind of task {kind.name!r} already; give yours another name")
    others = dict(KINDS)
    KINDS.clear()
    KINDS.update({kind.name: kind, **others})


def kind_of_config(config: Any) -> Kind | None:
    """The kind that a checkpoint was trained for, by its config; None for a bare encoder."""
    return next((kind for kind in KINDS.values() if kind.recognises(config)), None)


def kind_of(model: nn.Module) -> Kind:
    """The kind of a model in memory: the one that it was loaded as, else by its class and config."""
    if (known := vars(model).get("task_kind")) is not None:
        return known
    config, name = getattr(model, "config", None), type(model).__name__
    found = (
        kind for kind in KINDS.values() if config is not None and kind.recognises(config, name)
    )
    return next(found, SINGLE_LABEL).bound(config)


__all__ = [
    "EMBEDDING",
    "KINDS",
    "LISTWISE_RERANKING",
    "MULTI_LABEL",
    "QUESTION_ANSWERING",
    "REGRESSION",
    "RERANKING",
    "SINGLE_LABEL",
    "TOKEN_CLASSIFICATION",
    "Kind",
    "is_cross_encoder",
    "kind_of",
    "kind_of_config",
    "model_inputs",
    "register_kind",
]
