"""Factored layers with their factors packed, and what an encoder layer does with them.

Each function takes packed or dense linear layers, because a planned model leaves some matrices dense. Where the
dispatcher of ``lowrank_kernels`` has more than library matmuls to offer and every layer is packed, one fused operator does
the work; elsewhere library calls do, with activations and residual sums written over tensors that nothing else reads,
since fresh tensors of several megabytes cost a CPU more in page faults than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowrank_kernels import (
    LowRankLinear,
    dispatch,
    lowrank_ffn,
    lowrank_linear,
    lowrank_linear_norm,
    lowrank_qkv,
    pack_factors,
)

from .replacement import Replacement

# Names of transformers' configs -> name in lowrank_kernels, and the call that overwrites its input.
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", torch.ops.aten.gelu_),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
                    ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh"))),
    "relu": ("relu", F.relu_),
}


class PackedLinear(Replacement):
    """A ``LowRankLinear`` with its rank padded to a multiple of 16; no gradients.

    The layer that it stands for keeps no memory of its own: its parameters become views of the packed factors.
    """

    source: LowRankLinear

    def __init__(self, source: LowRankLinear):
        super().__init__(source)
        down, up = pack_factors(source.down, source.up)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach(), persistent=False)
        self._tie()

    def _tie(self) -> None:
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
        if dispatch.route(x, None) == "torch":
            return F.linear(F.linear(x, self.down), self.up, self.bias)
        return lowrank_linear(x, self.down, self.up, self.bias)


def packed(linear: nn.Module) -> nn.Module:
    """The packed form of a factored layer; any other as it is."""
    return PackedLinear(linear) if isinstance(linear, LowRankLinear) else linear


def _fusable(x: Tensor, *linears: nn.Module) -> bool:
    return dispatch.route(x, None) != "torch" and all(isinstance(linear, PackedLinear) for linear in linears)


def project(x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of x (rows, width)."""
    three = (query, key, value)
    if _fusable(x, *three):
        return lowrank_qkv(x, [one.down for one in three], [one.up for one in three], [one.bias for one in three])
    return query(x), key(x), value(x)


def add_and_normalise(x: Tensor, linear: nn.Module, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(residual + linear(x))."""
    if _fusable(x, linear) and norm.bias is not None:
        return lowrank_linear_norm(x, linear.down, linear.up, linear.bias, residual, norm.weight, norm.bias, norm.eps)
    return norm(linear(x).add_(residual))


def feed_forward(x: Tensor, first: nn.Module, activation: str, second: nn.Module, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(x + second(activation(first(x)))); ``activation`` is transformers' name."""
    name, overwrite = ACTIVATIONS.get(activation, (None, None))
    if name is not None and _fusable(x, first, second):
        inner = lowrank_ffn(x, first.down, first.up, first.bias, second.down, second.up, second.bias, name)
        return norm(inner.add_(x))
    neurons = first(x)
    neurons = ACT2FN[activation](neurons) if overwrite is None else overwrite(neurons)
    return add_and_normalise(neurons, second, x, norm)
