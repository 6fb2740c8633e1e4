"""Decomposition methods: one file each, registered under the name that options, tests and tables use.

A method factors one weight: ``factor(weight, bias, statistics, rank) -> (down, up, bias)``, with ``weight`` (out, in),
``down`` (rank, in), ``up`` (out, rank), all float64 on the way. ``spectrum`` gives the singular values that its
truncation drops, so that the method's own loss at rank r is the sum of squares from the r-th on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from ..statistics import InputStatistics

Factors = tuple[Tensor, Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Method:
    """A registered method; ``needs_inputs`` says whether it must be given statistics of the layer's input."""

    factor: Callable[[Tensor, "Tensor | None", "InputStatistics | None", int], Factors]
    spectrum: Callable[[Tensor, "InputStatistics | None"], Tensor]
    needs_inputs: bool


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> Method:
    """Make ``method`` selectable as ``--method name``."""
    METHODS[name] = method
    return method


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row of ``down`` and column of ``up`` to one norm; their product stays.

    Equal norms train better and stay in half-precision range.
    """
    of_down, of_up = down.norm(dim=1), up.norm(dim=0)
    scale = (of_down / of_up.clamp_min(1e-300)).sqrt()
    # A pair with a zero contributes nothing whatever its scale.
    scale = scale.where((of_down > 0) & (of_up > 0), scale.new_ones(()))
    return down / scale[:, None], up * scale


from . import svd, whiten  # noqa: E402, F401  (they register themselves)
