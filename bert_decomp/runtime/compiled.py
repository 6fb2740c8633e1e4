"""A fused int8 encoder as one call of the compiled CPU kernels: its blocks, as calibration decided them, packed.

Blocks that were left in float32 are float32 here, too. Where the kernels cannot serve, the blocks' own calls do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_kernels import cpu

from ..models.embedding import LowRankEmbedding
from ..models.int8 import QuantisedEmbedding
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

    def norm(self, norm: nn.LayerNorm, shift: Tensor | None = None) -> Any:
        return cpu.norm(norm.weight, norm.bias, norm.eps, shift)

    def embeddings(self, source: nn.Module | None) -> cpu.Embeddings | None:
        """Of a model's embeddings, or None where they are not what the kernels have."""
        parts: dict[str, Any] = {} if source is None else dict(source.named_children())
        words, positions, norm = (parts.pop(name, None) for name in EMBEDDINGS)
        types, _ = (parts.pop(name, None) for name in ("token_type_embeddings", "dropout"))
        if parts or type(positions) is not nn.Embedding or type(norm) is not nn.LayerNorm:
            return None
        if norm.weight.shape != positions.weight.shape[1:]:
            return None
        # The int8 embedding stands for a source; one that was loaded stands for itself.
        words = getattr(words, "rows", words)
        scale = up = None
        if isinstance(words, (LowRankEmbedding, QuantisedEmbedding)):
            rows, scale = words.codes, getattr(words, "scale", None)
            if words.up is not None:
                up = cpu.linear((cpu.product(self.level, words.up, words.bias),))
        elif type(words) is nn.Embedding:
            rows = words.weight
        else:
            return None
        return cpu.Embeddings(
            rows,
            positions.weight,
            self.norm(norm),
            None if types is None else types.weight,
            scale,
            up,
            -1 if positions.padding_idx is None else positions.padding_idx,
        )

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
            native.attention_norm = self.norm(layer_norm(first), first.constant.bias)
        else:
            self.attention(native, layer)
            native.attention_norm = self.norm(layer_norm(first))
        if isinstance(second, ConstantOutput):
            native.ffn_norm = self.norm(layer_norm(second), second.constant.bias)
        else:
            self.feed_forward(native, second)
            native.ffn_norm = self.norm(layer_norm(second))
        return native


# What embeddings are made of, beside token types and dropout.
EMBEDDINGS = ("word_embeddings", "position_embeddings", "LayerNorm")
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
    """The layers of a fused encoder in the compiled kernels, and the embeddings before them.

    Args:
        layers: fused layers; their blocks, int8 or float32, do not change any more.
        embeddings: the module whose output the first layer reads, or None.
        level: of the kernels, ``cpu.levels()``; None for the best one.

    Raises:
        ValueError: the level has no kernel for what the layers are.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        level: str | None = None,
        embeddings: nn.Module | None = None,
    ):
        self.layers, self.embeddings = list(layers), embeddings
        if not cpu.levels():
            raise ValueError(f"the compiled CPU kernels cannot be used: {cpu.why_not()}")
        if not _supported(self.layers):
            raise ValueError(
                "the compiled CPU kernels lack an activation or a block of this encoder"
            )
        self.level = level or cpu.levels()[0]
        self._native: cpu.Encoder | None = self._packed()

    def _packed(self) -> cpu.Encoder:
        packer = _Packer(self.level)
        layers = [packer.layer(layer) for layer in self.layers]
        width = len(layer_norm(self.layers[0].attention_output).weight)
        # What stands for words now: another may take its place in the module.
        self._words = getattr(self.embeddings, "word_embeddings", None)
        return cpu.Encoder(self.level, width, layers, packer.embeddings(self.embeddings))

    @property
    def native(self) -> cpu.Encoder:
        """The encoder in the kernels, which takes hidden states or token ids."""
        if self._native is None:
            self._native = self._packed()
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights can be neither copied nor saved; they are made again.
        return {**self.__dict__, "_native": None}

    def takes_ids(self, embeddings: nn.Module | None, typed: bool) -> bool:
        """Whether ``native.from_ids`` computes what this module, which may have been changed, and the layers do, of
        ids with token types if ``typed``."""
        packed = self.native.embeddings
        return (
            packed is not None
            and (packed.has_types or not typed)
            and embeddings is self.embeddings
            and getattr(embeddings, "word_embeddings", None) is self._words
        )
