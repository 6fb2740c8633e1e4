"""Factored layers with their factors packed, and what an encoder layer does with them.

Each function takes packed or dense linear layers, because a planned model leaves some matrices dense. Where the
dispatcher of ``lowrank_kernels`` has more than library matmuls to offer and every layer is packed, one fused operator does
the work; elsewhere library calls do. A fresh tensor of several megabytes costs a CPU more in page faults than a pass over it,
so there wide results go into buffers that all layers share, and sums and activations overwrite what nothing else reads.
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
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh")),
    ),
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
        self.register_buffer(
            "bias", None if source.bias is None else source.bias.detach(), persistent=False
        )
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


class Workspace:
    """Buffers for the results of one forward pass; a name's buffer is used again by each layer."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, width) tensor with the dtype and device of ``like``; its last use is over."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[name] = like.new_empty(rows * width)
        return buffer[: rows * width].view(rows, width)


def _into(workspace: Workspace | None, name: str, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) in the workspace's buffer of that name; in a tensor of its own without a workspace."""
    if workspace is None:
        return linear(x)
    factored = isinstance(linear, PackedLinear)
    inner, weight = (F.linear(x, linear.down), linear.up) if factored else (x, linear.weight)
    out = workspace.take(name, len(x), len(weight), x)
    if linear.bias is None:
        return torch.mm(inner, weight.t(), out=out)
    return torch.addmm(linear.bias, inner, weight.t(), out=out)


def _fusable(x: Tensor, *linears: nn.Module) -> bool:
    return dispatch.route(x, None) != "torch" and all(
        isinstance(linear, PackedLinear) for linear in linears
    )


def project(
    x: Tensor,
    query: nn.Module,
    key: nn.Module,
    value: nn.Module,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of x (rows, width)."""
    three = (query, key, value)
    if _fusable(x, *three):
        return lowrank_qkv(
            x, [one.down for one in three], [one.up for one in three], [one.bias for one in three]
        )
    return tuple(
        _into(workspace, name, one, x) for name, one in zip(("query", "key", "value"), three)
    )


def add_and_normalise(x: Tensor, linear: nn.Module, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm(residual + linear(x)); ``residual`` may be overwritten."""
    if not isinstance(linear, PackedLinear):
        return norm(residual.add_(linear(x)))
    if _fusable(x, linear) and norm.bias is not None:
        return lowrank_linear_norm(
            x, linear.down, linear.up, linear.bias, residual, norm.weight, norm.bias, norm.eps
        )
    if linear.bias is not None:
        residual.add_(linear.bias)
    return norm(residual.addmm_(F.linear(x, linear.down), linear.up.t()))


def feed_forward(
    x: Tensor,
    first: nn.Module,
    activation: str,
    second: nn.Module,
    norm: nn.LayerNorm,
    workspace: Workspace | None = None,
) -> Tensor:
    """LayerNorm(x + second(activation(first(x)))); ``activation`` is transformers' name, ``x`` may be overwritten."""
    name, overwrite = ACTIVATIONS.get(activation, (None, None))
    if name is not None and _fusable(x, first, second):
        inner = lowrank_ffn(
            x, first.down, first.up, first.bias, second.down, second.up, second.bias, name
        )
        return norm(inner.add_(x))
    neurons = _into(workspace, "neurons", first, x)
    neurons = ACT2FN[activation](neurons) if overwrite is None else overwrite(neurons)
    return add_and_normalise(neurons, second, x, norm)
