"""The three steps of an encoder layer around its attention: query-key-value, attention output, feed-forward.

Each takes factored or dense linear layers, because a planned model leaves some matrices dense. Where the dispatcher of
``lowrank_kernels`` has more than library matmuls to offer and every layer is factored, one fused operator does the
work; elsewhere library calls do. A fresh tensor of several megabytes costs a CPU more in page faults than a pass over
it, so there wide results go into buffers that all layers share, and sums and activations overwrite what nothing else
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowrank_kernels import dispatch
from lowrank_kernels.inference import (
    Prepared,
    prepare_attention,
    prepare_ffn,
    prepare_norm,
    prepare_qkv,
)

from ..models.resized import Constant
from .linears import AlignedLinear, Linear, last_product, single_operators
from .sequences import Sequences

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

    def fused(self, x: Tensor, *rest: Any) -> Any:
        """The step by its fused operator, or None where library calls are the choice."""
        if self._fused is None:
            self._fused = self._prepare()
        return None if self._fused is None else self._fused(x, *rest)


class _Stacked:
    """Three dense layers as one weight, of which their own weights and biases become views. No copy keeps it."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.widths = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        parts = zip(
            layers, self.weight.split(self.widths), self.bias.split(self.widths), strict=True
        )
        for layer, weight, bias in parts:
            layer.weight.data, layer.bias.data = weight, bias

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(self.widths, 1)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class QueryKeyValue(Block):
    """Query, key and value of rows (tokens, width)."""

    def __init__(self, query: Linear, key: Linear, value: Linear):
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self._fused = self._prepare()
        self._stacked: _Stacked | None = None
        self.stack()

    def stack(self, everywhere: bool = False) -> None:
        """Make one product of three dense ones. It saves launches, so a CPU is left out (but for ``everywhere``)."""
        layers = (self.query, self.key, self.value)
        dense = [one for one in layers if type(one) is nn.Linear and one.bias is not None]
        wanted = len(dense) == 3 and (everywhere or dense[0].weight.device.type == "cuda")
        if wanted:
            self._stacked = _Stacked(dense)
        else:
            self.unstack()

    def unstack(self) -> None:
        """Give the layers tensors of their own again."""
        if self._stacked is not None:
            self._stacked = None
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self.stack()
        return self

    def forward(
        self, x: Tensor, asking: Tensor | None = None, workspace: Workspace | None = None
    ) -> tuple[Tensor, ...]:
        """Keys and values of x (tokens, width); queries of ``asking`` (rows, width), or of x if it is None."""
        if asking is not None:
            return self.query(asking), self.key(x), self.value(x)
        results = self.fused(x) if self._stacked is None else self._stacked(x)
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


class Attention(Block):
    """Attention within sentences by some heads, of which scores and values may be of different sizes."""

    like: Tensor

    def __init__(self, heads: int, score_width: int, value_width: int, like: Tensor):
        """Widths are of all heads; ``like`` has the dtype and the device of the inputs."""
        super().__init__()
        self.heads, self.sizes = heads, (score_width // heads, value_width // heads)
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)
        self._fused = self._prepare()

    def forward(
        self, sequences: Sequences, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The context (rows, heads * value size) of what ``QueryKeyValue`` gives."""
        # A CPU has none unless it is asked for, and is spared the question.
        asked = query.device.type != "cpu" or dispatch.override() != "auto"
        return sequences.attention(
            query, key, value, self.heads, bias, self.fused if asked else None
        )

    def _prepare(self) -> Prepared:
        return prepare_attention(self.heads, *self.sizes, self.like.dtype, self.like.device)


class ResidualNorm(Block):
    """LayerNorm(residual + y), in one pass over both where the dispatcher has a kernel for it."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm
        self._fused = self._prepare()

    def forward(self, residual: Tensor, linear: Linear, x: Tensor) -> Tensor:
        """y is linear(x), of the shape (tokens, width) of ``residual``, which may be overwritten."""
        # Adding to the residual saves a CPU a tensor; a GPU's allocator keeps its tensors.
        if residual.device.type == "cpu" and dispatch.override() == "auto":
            return self.norm(_add(linear, x, residual))
        return self.of_sum(residual, linear(x))

    def of_sum(self, residual: Tensor, y: Tensor) -> Tensor:
        """The norm of the sum of two tensors (tokens, width); ``y`` may be overwritten."""
        result = self.fused(y, residual)
        return self.norm(y.add_(residual)) if result is None else result

    def _prepare(self) -> Prepared | None:
        weight, bias = self.norm.weight, self.norm.bias
        if weight is None or bias is None:
            return None
        return prepare_norm(weight.detach(), bias.detach(), self.norm.eps)


def layer_norm(block: nn.Module) -> nn.LayerNorm:
    """The LayerNorm at the end of a step, whatever its form."""
    norm = block.norm.norm if isinstance(block.norm, ResidualNorm) else block.norm
    assert isinstance(norm, nn.LayerNorm)
    return norm


class AttentionOutput(Block):
    """LayerNorm(residual + linear(context))."""

    def __init__(self, linear: Linear, norm: nn.LayerNorm):
        super().__init__()
        self.linear, self.norm = linear, ResidualNorm(norm)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        """context, residual (tokens, width) -> (tokens, width); ``residual`` may be overwritten."""
        return self.norm(residual, self.linear, context)

    def _prepare(self) -> None:
        # On an H100 two products and a pass of ``norm`` take half of the time of ``linear_norm`` at 4096 tokens.
        return None


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
        self.intermediate, self.output, self.norm = intermediate, output, ResidualNorm(norm)
        self.activation = activation
        self._fused = self._prepare()

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        """x (tokens, width) -> (tokens, width); ``x`` may be overwritten."""
        result = self.fused(x)
        if result is not None:
            return self.norm.of_sum(x, result)
        _, overwrite = ACTIVATIONS.get(self.activation, (None, None))
        neurons = _into(workspace, "neurons", self.intermediate, x)
        neurons = ACT2FN[self.activation](neurons) if overwrite is None else overwrite(neurons)
        return self.norm(x, self.output, neurons)

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
