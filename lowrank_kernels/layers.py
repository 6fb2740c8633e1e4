"""Layers in the form that the ``kernels`` library puts into models: without state or a constructor of their own.

``kernelize`` gives their ``forward`` to a module of the same attributes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .operators.linear import lowrank_linear


class LowRankLinear(nn.Module):
    """The forward of a module with ``down`` (rank, in_features), ``up`` (out_features, rank) and ``bias`` or None."""

    can_torch_compile = True
    has_backward = True
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return lowrank_linear(x, self.down, self.up, self.bias)
