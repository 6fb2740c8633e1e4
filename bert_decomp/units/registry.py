"""What a unit offers, and the units by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..planning.blocks import LayerPlan
from ..planning.option import Grid, Option
from .matrix import Matrix


class Unit(Protocol):
    """A decomposition of one block of a layer, prepared for that layer."""

    def options(self, grid: Grid, factored: bool) -> list[Option]:
        """What the block may become; with ``factored``, with two factors on top as well."""

    def reduce(self, plan: LayerPlan) -> dict[str, Matrix]:
        """The block's matrices by part, at the sizes of ``plan``, before any two factors on top."""


# Each takes the ``Layer`` that it is prepared for.
UNITS: dict[str, Callable[[Any], Unit]] = {}


def register_unit(name: str, unit: Callable[[Any], Unit]) -> None:
    """Make ``unit`` known as ``name``."""
    UNITS[name] = unit
