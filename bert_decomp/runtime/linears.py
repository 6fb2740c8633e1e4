"""Factored layers in their inference form, and what any linear layer of a fused encoder has in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear, align_factors, dispatch
from lowrank_kernels.inference import Prepared, prepare_linear

from ..errors import UserError
from ..models.linear_pairs import LinearPair
from ..models.replacement import Replacement


class AlignedLinear(Replacement):
    """A ``LowRankLinear`` with its rank padded to a multiple of 16; no gradients.

    The layer that it stands for keeps no memory of its own: its parameters become views of the aligned factors.
    """

    source: LowRankLinear
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(self, source: LowRankLinear):
        super().__init__(source)
        down, up = align_factors(source.down, source.up)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer(
            "bias", None if source.bias is None else source.bias.detach(), persistent=False
        )
        self._fused: Prepared | None = None
        self._tie()

    @torch.no_grad()
    def refresh(self) -> None:
        rank = self.source.rank
        self.down[:rank].copy_(self.source.down)
        self.up[:, :rank].copy_(self.source.up)
        if self.bias is not None:
            self.bias.copy_(self.source.bias)
        dispatch.void_plans()
        self._tie()

    def _tie(self) -> None:
        self._fused = prepare_linear(self.down, self.up, self.bias)
        rank = self.source.rank
        self.source.down.data, self.source.up.data = self.down[:rank], self.up[:, :rank]
        if self.bias is not None:
            self.source.bias.data = self.bias

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._tie()
        return self

    def release(self) -> None:
        for parameter in self.source.parameters():
            parameter.data = parameter.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self._fused is None:
            self._fused = prepare_linear(self.down, self.up, self.bias)
        y = self._fused(x.flatten(0, -2) if x.dim() > 2 else x)
        if y is None:
            return F.linear(F.linear(x, self.down), self.up, self.bias)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 2 else y


def single_operators(module: nn.Module) -> list[Prepared]:
    """The operator of each factored layer in a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, AlignedLinear)]
    return [layer._fused for layer in layers if layer._fused is not None]


# A linear layer of a fused encoder.
Linear = AlignedLinear | nn.Linear


def aligned(linear: nn.Module) -> Linear:
    """The inference form of a factored layer, split or not; a dense layer as it is.

    Raises:
        UserError: it is neither.
    """
    if isinstance(linear, LinearPair):
        linear = linear.joined()
    if isinstance(linear, LowRankLinear):
        return AlignedLinear(linear)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{type(linear).__name__} has no inference form; leave the model unfused")
    return linear


def last_product(linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of ``linear(x)``: h and W with linear(x) = h W^T + bias, where h is x for a dense layer."""
    if isinstance(linear, AlignedLinear):
        return F.linear(x, linear.down), linear.up
    return x, linear.weight
