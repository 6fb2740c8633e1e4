"""The three steps of an encoder layer around its attention: query-key-value, attention output, feed-forward.

Each takes factored or dense linear layers, because a planned model leaves some matrices dense. Where the dispatcher of
``lowrank_kernels`` has more than library matmuls to offer and every layer is factored, one fused operator does the work;
elsewhere library calls do. A fresh tensor of several megabytes costs a CPU more in page faults than a pass over it, so
there wide results go into buffers that all layers share, and sums and activations overwrite what nothing else reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowrank_kernels import dispatch, lowrank_ffn, lowrank_linear_norm, lowrank_qkv

from ..models.resized import Constant
from .linears import AlignedLinear, last_product

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


def _into(workspace: Workspace | None, name: str, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) in the workspace's buffer of that name; in a tensor of its own without a workspace."""
    if workspace is None:
        return linear(x)
    inner, weight = last_product(linear, x)
    out = workspace.take(name, len(x), len(weight), x)
    if linear.bias is None:
        return torch.mm(inner, weight.t(), out=out)
    return torch.addmm(linear.bias, inner, weight.t(), out=out)


def _fusable(x: Tensor, *linears: nn.Module) -> bool:
    return dispatch.route(x, None) != "torch" and all(
        isinstance(linear, AlignedLinear) for linear in linears
    )


def _add(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x), in the memory of ``residual``."""
    inner, weight = last_product(linear, x)
    if linear.bias is not None:
        residual.add_(linear.bias)
    return residual.addmm_(inner, weight.t())


class QueryKeyValue(nn.Module):
    """Query, key and value of rows (tokens, width)."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module):
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(
        self, x: Tensor, asking: Tensor | None = None, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of x (tokens, width); queries of ``asking`` (rows, width), or of x if it is None."""
        if asking is not None:
            return self.query(asking), self.key(x), self.value(x)
        three = (self.query, self.key, self.value)
        if _fusable(x, *three):
            return lowrank_qkv(
                x,
                [one.down for one in three],
                [one.up for one in three],
                [one.bias for one in three],
            )
        return tuple(
            _into(workspace, name, one, x) for name, one in zip(("query", "key", "value"), three)
        )


class AttentionOutput(nn.Module):
    """LayerNorm(residual + linear(context))."""

    def __init__(self, linear: nn.Module, norm: nn.LayerNorm):
        super().__init__()
        self.linear, self.norm = linear, norm

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        """context, residual (tokens, width) -> (tokens, width); ``residual`` may be overwritten."""
        linear, norm = self.linear, self.norm
        if _fusable(context, linear) and norm.bias is not None:
            return lowrank_linear_norm(
                context,
                linear.down,
                linear.up,
                linear.bias,
                residual,
                norm.weight,
                norm.bias,
                norm.eps,
            )
        return norm(_add(linear, context, residual))


class ConstantOutput(nn.Module):
    """LayerNorm(x + bias): what is left of a half whose matrices are gone."""

    def __init__(self, constant: Constant, norm: nn.LayerNorm):
        super().__init__()
        self.constant, self.norm = constant, norm

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        """x (tokens, width) -> (tokens, width); ``x`` may be overwritten."""
        return self.norm(x.add_(self.constant.bias))


class FeedForward(nn.Module):
    """LayerNorm(x + output(activation(intermediate(x)))); ``activation`` is transformers' name."""

    def __init__(
        self, intermediate: nn.Module, activation: str, output: nn.Module, norm: nn.LayerNorm
    ):
        super().__init__()
        self.intermediate, self.output, self.norm = intermediate, output, norm
        self.activation = activation

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        """x (tokens, width) -> (tokens, width); ``x`` may be overwritten."""
        first, second = self.intermediate, self.output
        name, overwrite = ACTIVATIONS.get(self.activation, (None, None))
        if name is not None and _fusable(x, first, second):
            result = lowrank_ffn(
                x, first.down, first.up, first.bias, second.down, second.up, second.bias, name
            )
            return self.norm(result.add_(x))
        neurons = _into(workspace, "neurons", first, x)
        neurons = ACT2FN[self.activation](neurons) if overwrite is None else overwrite(neurons)
        return self.norm(_add(second, neurons, x))
