"""What is decomposed together: pairs of matrices of a layer that act only through each other, one file a unit.

| unit | makes smaller | block of the plan |
| --- | --- | --- |
| ``scores`` | query and key: dimensions of every head | scores |
| ``values`` | value and attention output: dimensions of every head | values |
| ``heads`` | all four, by whole heads and by both kinds of dimensions | attention |
| ``neurons`` | the two matrices of the feed-forward | feed_forward |

A unit prepares a layer once, then lists what it offers for its block (each with the loss that is expected of it), and
makes the smaller matrices for the sizes that were chosen. To leave a block as it is, and to drop it, are offers like
any other; ``factors`` adds two factors on top of the smaller matrices. Losses are in the unit of ``Matrix.price``, so
those of different blocks compare. ``FORMS`` says which blocks are chosen together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..planning.option import Grid, Option
from .layer import Layer, family_of, layers_of, sizes_of
from .matrix import Matrix
from .registry import UNITS, Unit, register_unit

__all__ = [
    "FORMS",
    "UNITS",
    "Form",
    "Grid",
    "Layer",
    "Matrix",
    "Option",
    "Unit",
    "family_of",
    "get_form",
    "layers_of",
    "register_unit",
    "sizes_of",
]


@dataclass(frozen=True)
class Form:
    """What is chosen together.

    ``blocks``: the units that options come from, by block. ``factored``: with two factors on top. ``grid``: the sizes
    that are offered.
    """

    blocks: dict[str, str]
    factored: bool
    grid: Grid


FORMS: dict[str, Form] = {
    # Dense matrices of smaller sizes, which any engine runs as plain attention.
    "structured": Form(
        {"attention": "heads", "feed_forward": "neurons"}, factored=False, grid=Grid()
    ),
    # Whatever loses least for its weights.
    "mixed": Form(
        {"scores": "scores", "values": "values", "feed_forward": "neurons"},
        factored=True,
        grid=Grid(),
    ),
}


def get_form(name: str) -> Form:
    """The form called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in FORMS:
        raise UserError(f"unknown units {name!r}; choose one of matrices, {', '.join(FORMS)}")
    return FORMS[name]


from . import heads, neurons, scores, values  # noqa: E402

register_unit("scores", scores.Scores)
register_unit("values", values.Values)
register_unit("heads", heads.Heads)
register_unit("neurons", neurons.Neurons)
