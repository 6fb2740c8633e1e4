"""What a block of a layer may become, and the sizes that are offered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .blocks import LayerPlan


@dataclass(frozen=True)
class Option:
    """One offer for a block: the ``loss`` expected of it, the ``LayerPlan`` fields it sets, and ``ranks`` by part."""

    loss: float
    sizes: dict[str, Any]
    ranks: dict[str, int] = field(default_factory=dict)

    def apply(self, plan: LayerPlan) -> LayerPlan:
        """``plan`` with this block's sizes and ranks."""
        return replace(
            plan,
            **self.sizes,
            ranks={**plan.ranks, **self.ranks},
            expected_loss=(plan.expected_loss or 0.0) + self.loss,
        )

    def within(self, plan: LayerPlan) -> bool:
        """Whether the block keeps only what ``plan`` does."""
        return replace(plan, **self.sizes).within(plan)


@dataclass(frozen=True)
class Grid:
    """Sizes that engines like: heads in multiples of ``head_multiple``, neurons of ``neuron_multiple``.

    The full size is always among them. ``coarse`` parts of a size are where two factors on top are tried.
    """

    head_multiple: int = 4
    neuron_multiple: int = 16
    coarse: tuple[float, ...] = (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)

    def head_sizes(self, full: int) -> list[int]:
        return [*range(self.head_multiple, full, self.head_multiple), full]

    def neuron_counts(self, full: int) -> list[int]:
        return [*range(self.neuron_multiple, full, self.neuron_multiple), full]

    def coarse_head_sizes(self, full: int) -> list[int]:
        """Eighths up to three quarters, in multiples, and the full size."""
        multiple = self.head_multiple
        sizes = {multiple * round(full * part / 8 / multiple) for part in range(1, 7)}
        return [*sorted(size for size in sizes if 0 < size < full), full]

    def coarse_neuron_counts(self, full: int) -> list[int]:
        multiple = self.neuron_multiple
        sizes = {multiple * round(full * part / multiple) for part in self.coarse}
        return [*sorted(size for size in sizes if 0 < size < full), full]
