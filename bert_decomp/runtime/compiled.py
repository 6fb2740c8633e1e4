"""A fused int8 encoder as one call of the compiled CPU kernels: its blocks, as calibration decided them, packed.

Blocks that were left in float32 are float32 here, too. Where the kernels cannot serve, the blocks' own calls do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_kernels import cpu

from .blocks import ACTIVATIONS as ACTIVATION_NAMES
from .blocks import AttentionOutput, ConstantOutput, FeedForward, QueryKeyValue, layer_norm
from .int8_blocks import Encoded, Int8AttentionOutput, Int8FeedForward, Int8QueryKeyValue
from .linears import Linear
from .quantised import Codes, Int8Linear, weights_of


class _Packer:
    """Makes the native parts of layers for one level of the kernels."""

    def __init__(self, level: str):
        self.level = level

    def codes(self, codes: Codes) -> Any:
        return cpu.codes(codes.scale, codes.zero, codes.top)

    def encoding(self, encoded: Encoded) -> Any:
        codes = encoded.codes
        return cpu.encoding(encoded.balance / codes.scale, codes.zero, codes.top)

    def linear(self, linear: Linear | Int8Linear, factor: float = 1.0) -> Any:
        """The layer, its results times ``factor``."""
        if isinstance(linear, Int8Linear):
            *before, last = linear.products
            products = [
                cpu.product8(self.level, one.weight, one.scale, one.bias, self.codes(one.source))
                for one in before
            ]
            products.append(
                cpu.product8(
                    self.level, last.weight, last.scale, last.bias, self.codes(last.source), factor
                )
            )
            return cpu.linear(products, None if linear.inner is None else self.codes(linear.inner))
        *first, weight = weights_of(linear)
        return cpu.linear(
            [
                *(cpu.product(self.level, one, None) for one in first),
                cpu.product(self.level, weight, linear.bias, factor),
            ]
        )

    def norm(self, block: nn.Module, shift: Tensor | None = None) -> Any:
        norm = layer_norm(block)
        return cpu.norm(norm.weight, norm.bias, norm.eps, shift)

    def attention(self, native: Any, layer: Any) -> None:
        block, output = layer.query_key_value, layer.attention_output
        native.heads = layer.heads
        # Widths of query and value are those of their last products.
        query, value = (
            (one.products[-1].weight if isinstance(one, Int8Linear) else weights_of(one)[-1])
            for one in (block.query, block.value)
        )
        native.score_size, native.value_size = (len(one) // layer.heads for one in (query, value))
        native.kept = list(range(layer.heads)) if layer.kept is None else list(layer.kept)
        native.query = self.linear(block.query, native.score_size**-0.5)
        native.key, native.value = self.linear(block.key), self.linear(block.value)
        native.output = self.linear(output.linear)
        if isinstance(block, Int8QueryKeyValue):
            native.input_codes = self.encoding(block.encoded)
        if isinstance(output, Int8AttentionOutput):
            native.context_codes = self.encoding(output.encoded)

    def feed_forward(self, native: Any, block: Any) -> None:
        native.intermediate = self.linear(block.intermediate)
        native.ffn_output = self.linear(block.output)
        activations = cpu.module().Activation
        if not isinstance(block, Int8FeedForward):
            native.activation = getattr(activations, ACTIVATION_NAMES[block.activation][0])
            return
        native.activation = getattr(activations, block.activation)
        native.ffn_codes, native.neurons = self.encoding(block.encoded), self.codes(block.neurons)
        outliers = (cpu.product(self.level, block.first, block.first_bias),)
        native.outliers = cpu.linear(outliers)
        native.outliers_output = cpu.linear((cpu.product(self.level, block.second, None),))

    def layer(self, layer: Any) -> Any:
        native = cpu.module().Layer()
        first, second = layer.attention_output, layer.feed_forward
        if isinstance(first, ConstantOutput):
            native.attention_norm = self.norm(first, first.constant.bias)
        else:
            self.attention(native, layer)
            native.attention_norm = self.norm(first)
        if isinstance(second, ConstantOutput):
            native.ffn_norm = self.norm(second, second.constant.bias)
        else:
            self.feed_forward(native, second)
            native.ffn_norm = self.norm(second)
        return native


BLOCKS = (
    *(QueryKeyValue, Int8QueryKeyValue, AttentionOutput, Int8AttentionOutput),
    *(ConstantOutput, FeedForward, Int8FeedForward, type(None)),
)


def _supported(layers: Iterable[Any]) -> bool:
    """Whether the kernels have every block of the layers, and its activation."""
    for layer in layers:
        blocks = (layer.query_key_value, layer.attention_output, layer.feed_forward)
        if any(type(block) not in BLOCKS for block in blocks):
            return False
        float_block = isinstance(layer.feed_forward, FeedForward)
        if float_block and layer.feed_forward.activation not in ACTIVATION_NAMES:
            return False
    return True


class CompiledEncoder:
    """The layers of a fused encoder in the compiled kernels.

    Args:
        layers: fused layers; their blocks, int8 or float32, do not change any more.
        level: of the kernels, ``cpu.levels()``; None for the best one.

    Raises:
        ValueError: the level has no kernel for what the layers are.
    """

    def __init__(self, layers: Iterable[Any], level: str | None = None):
        self.layers = list(layers)
        if not cpu.levels():
            raise ValueError(f"the compiled CPU kernels cannot be used: {cpu.why_not()}")
        if not _supported(self.layers):
            raise ValueError(
                "the compiled CPU kernels lack an activation or a block of this encoder"
            )
        self.level = level or cpu.levels()[0]
        self._native: cpu.Encoder | None = None
        self._encoder()

    def _encoder(self) -> cpu.Encoder:
        if self._native is None:
            packer = _Packer(self.level)
            layers = [packer.layer(layer) for layer in self.layers]
            width = len(layer_norm(self.layers[0].attention_output).weight)
            self._native = cpu.Encoder(self.level, width, layers)
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights can be neither copied nor saved; they are made again.
        return {**self.__dict__, "_native": None}

    def __call__(
        self,
        hidden: Tensor,
        lengths: list[int],
        bias: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """See ``lowrank_kernels.cpu.Encoder``."""
        return self._encoder()(hidden, lengths, bias, first_only)
