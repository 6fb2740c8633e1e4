"""The three steps of an encoder layer around its attention: query-key-value, attention output, feed-forward.

Each takes factored or dense linear layers, because a planned model leaves some matrices dense. Where the dispatcher of
``lowrank_kernels`` has more than library matmuls to offer and every layer is factored, one fused operator does the
work; elsewhere library calls do. A fresh tensor of several megabytes costs a CPU more in page faults than a pass over
it, so there wide results go into buffers that all layers share, and sums and activations overwrite what nothing else
reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowrank_kernels.inference import (
    Prepared,
    prepare_ffn,
    prepare_linear_norm,
    prepare_qkv,
)

from ..models.resized import Constant
from .linears import AlignedLinear, Linear, last_product, single_operators

# Names of transformers' configs -> name in lowrank_kernels, and the call that overwrites its input.
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", torch.ops.aten.gelu_),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        ("gelu_tanh", lambda x: torch.ops.aten.gelu_(x, approximate="tanh")),
    ),
    "relu": ("relu", F.relu_),
}


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


def _into(workspace: Workspace | None, name: str, linear: Linear, x: Tensor) -> Tensor:
    """linear(x) in the workspace's buffer of that name; in a tensor of its own without a workspace."""
    if workspace is None:
        return linear(x)
    inner, weight = last_product(linear, x)
    out = workspace.take(name, len(x), len(weight), x)
    if linear.bias is None:
        return torch.mm(inner, weight.t(), out=out)
    return torch.addmm(linear.bias, inner, weight.t(), out=out)


def _add(linear: Linear, x: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x), in the memory of ``residual``."""
    inner, weight = last_product(linear, x)
    if linear.bias is not None:
        residual.add_(linear.bias)
    return residual.addmm_(inner, weight.t())


class Block(nn.Module):
    """A step that one fused operator can do where all its matrices are factored."""

    def __init__(self) -> None:
        super().__init__()
        # Holds the factors' addresses: prepared again where they were moved, and by a copy.
        self._fused: Prepared | None = None

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._fused = self._prepare()
        return self

    def _prepare(self) -> Prepared | None:
        """The fused operator of this step, or None if it has none."""
        raise NotImplementedError

    def operators(self) -> list[Prepared]:
        """What calls go to: this step's operator, or its factored matrices' one by one."""
        return single_operators(self) if self._fused is None else [self._fused]

    def fused(self, x: Tensor, *rest: Tensor) -> Any:
        """The step by its fused operator, or None where library calls are the choice."""
        if self._fused is None:
            self._fused = self._prepare()
        return None if self._fused is None else self._fused(x, *rest)


class QueryKeyValue(Block):
    """Query, key and value of rows (tokens, width)."""

    def __init__(self, query: Linear, key: Linear, value: Linear):
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self._fused = self._prepare()

    def forward(
        self, x: Tensor, asking: Tensor | None = None, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of x (tokens, width); queries of ``asking`` (rows, width), or of x if it is None."""
        if asking is not None:
            return self.query(asking), self.key(x), self.value(x)
        results = self.fused(x)
        if results is not None:
            return results
        return (
            _into(workspace, "query", self.query, x),
            _into(workspace, "key", self.key, x),
            _into(workspace, "value", self.value, x),
        )

    def _prepare(self) -> Prepared | None:
        three = [
            one for one in (self.query, self.key, self.value) if isinstance(one, AlignedLinear)
        ]
        if len(three) < 3:
            return None
        return prepare_qkv(
            [one.down for one in three], [one.up for one in three], [one.bias for one in three]
        )


class AttentionOutput(Block):
    """LayerNorm(residual + linear(context))."""

    def __init__(self, linear: Linear, norm: nn.LayerNorm):
        super().__init__()
        self.linear, self.norm = linear, norm
        self._fused = self._prepare()

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        """context, residual (tokens, width) -> (tokens, width); ``residual`` may be overwritten."""
        result = self.fused(context, residual)
        return self.norm(_add(self.linear, context, residual)) if result is None else result

    def _prepare(self) -> Prepared | None:
        linear, norm = self.linear, self.norm
        if not isinstance(linear, AlignedLinear) or norm.bias is None:
            return None
        if norm.weight.dtype != linear.up.dtype:
            return None
        return prepare_linear_norm(
            linear.down, linear.up, linear.bias, norm.weight, norm.bias, norm.eps
        )


class ConstantOutput(nn.Module):
    """LayerNorm(x + bias): what is left of a half whose matrices are gone."""

    def __init__(self, constant: Constant, norm: nn.LayerNorm):
        super().__init__()
        self.constant, self.norm = constant, norm

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        """x (tokens, width) -> (tokens, width); ``x`` may be overwritten."""
        return self.norm(x.add_(self.constant.bias))


class FeedForward(Block):
    """LayerNorm(x + output(activation(intermediate(x)))); ``activation`` is transformers' name."""

    def __init__(self, intermediate: Linear, activation: str, output: Linear, norm: nn.LayerNorm):
        super().__init__()
        self.intermediate, self.output, self.norm = intermediate, output, norm
        self.activation = activation
        self._fused = self._prepare()

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        """x (tokens, width) -> (tokens, width); ``x`` may be overwritten."""
        result = self.fused(x)
        if result is not None:
            return self.norm(result.add_(x))
        _, overwrite = ACTIVATIONS.get(self.activation, (None, None))
        neurons = _into(workspace, "neurons", self.intermediate, x)
        neurons = ACT2FN[self.activation](neurons) if overwrite is None else overwrite(neurons)
        return self.norm(_add(self.output, neurons, x))

    def _prepare(self) -> Prepared | None:
        first, second = self.intermediate, self.output
        name, _ = ACTIVATIONS.get(self.activation, (None, None))
        if name is None:
            return None
        if not isinstance(first, AlignedLinear) or not isinstance(second, AlignedLinear):
            return None
        return prepare_ffn(
            first.down, first.up, first.bias, second.down, second.up, second.bias, name
        )
