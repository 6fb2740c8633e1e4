"""One layer of a fused encoder: its blocks, in float32 or int8, of the layer that it stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.architectures import LINEARS, Family, submodule
from ..models.int8 import QuantisedLinear
from ..models.resized import Constant, ResizedAttention, attention_name
from .blocks import (
    Attention,
    AttentionOutput,
    ConstantOutput,
    FeedForward,
    QueryKeyValue,
    Workspace,
)
from .int8_blocks import Int8AttentionOutput, Int8FeedForward, Int8QueryKeyValue
from .linears import aligned
from .sequences import Sequences


class FusedLayer(nn.Module):
    """One encoder layer that normalises after each half, on rows (tokens, width), which it may overwrite.

    Heads may be fewer or of another size than the architecture's (see ``models.resized``), and a half may be gone.
    """

    def __init__(self, layer: nn.Module, family: Family, heads: int, activation: str):
        super().__init__()
        attention = layer.get_submodule(attention_name(family))
        left = list(attention.heads) if isinstance(attention, ResizedAttention) else None
        self.heads = heads if left is None else len(left)
        # Which of the architecture's heads are left, where not all are.
        self.kept = left if self.heads < heads else None
        part: dict[str, Any] = {
            name: layer.get_submodule(getattr(family, name)) for name in LINEARS
        }
        attention_norm = submodule(layer, family.attention_norm, nn.LayerNorm)
        ffn_norm = submodule(layer, family.ffn_norm, nn.LayerNorm)
        if _stored(*part.values(), whole=False):
            _check_sizes(part, len(attention_norm.weight), self.heads)
        self.query_key_value: QueryKeyValue | Int8QueryKeyValue | None = None
        self.attention_output: AttentionOutput | Int8AttentionOutput | ConstantOutput
        self.feed_forward: FeedForward | Int8FeedForward | ConstantOutput
        self.attention: Attention | None = None
        output, ffn_output = part["attention_output"], part["ffn_output"]
        if isinstance(output, Constant):
            self.attention_output = ConstantOutput(output, attention_norm)
        else:
            three = [part["query"], part["key"], part["value"]]
            stored = _stored(*three)
            self.query_key_value = (
                Int8QueryKeyValue(*stored) if stored else QueryKeyValue(*map(aligned, three))
            )
            of_scores, of_values = part["query"].out_features, part["value"].out_features
            self.attention = Attention(self.heads, of_scores, of_values, attention_norm.weight)
            if isinstance(output, QuantisedLinear):
                self.attention_output = Int8AttentionOutput(output, attention_norm)
            else:
                self.attention_output = AttentionOutput(aligned(output), attention_norm)
        if isinstance(ffn_output, Constant):
            self.feed_forward = ConstantOutput(ffn_output, ffn_norm)
        elif stored := _stored(part["ffn_intermediate"], ffn_output):
            first, second = stored
            self.feed_forward = Int8FeedForward(first, second, activation, ffn_norm)
        else:
            self.feed_forward = FeedForward(
                aligned(part["ffn_intermediate"]), activation, aligned(ffn_output), ffn_norm
            )

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        bias: Tensor | None = None,
        first_only: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        first = x[sequences.first()] if first_only else None
        if self.query_key_value is None or self.attention is None:
            x = self.attention_output(x if first is None else first)
            return self.feed_forward(x, workspace)
        query, key, value = self.query_key_value(x, first, workspace)
        if bias is not None and self.kept is not None:
            bias = bias[:, self.kept]
        context = self.attention(sequences, query, key, value, bias)
        x = self.attention_output(context, x if first is None else first)
        return self.feed_forward(x, workspace)


def _check_sizes(part: dict[str, Any], width: int, heads: int) -> None:
    """Raise UserError if linear layers that came from a file do not fit together: kernels read them by address."""
    chains = (("query", "key", "value", "attention_output"), ("ffn_intermediate", "ffn_output"))
    for names in chains:
        *first, last = (part[name] for name in names)
        if isinstance(last, Constant):
            continue
        outer = [one.out_features for one in first]
        if not (
            all(one.in_features == width for one in first)
            and last.in_features == outer[-1]
            and last.out_features == width
            and (len(first) == 1 or outer[0] == outer[1])
            and (len(first) == 1 or all(heads and size % heads == 0 for size in outer))
        ):
            raise UserError(f"the model has {', '.join(names)} of sizes that do not fit together")


def _stored(*linears: nn.Module, whole: bool = True) -> list[QuantisedLinear]:
    """The linear layers of a block as a file has them in 8 bits; none if they are in floating point.

    Raises:
        UserError: only some are in 8 bits, and ``whole`` says that all must be.
    """
    stored = [linear for linear in linears if isinstance(linear, QuantisedLinear)]
    if whole and stored and len(stored) < len(linears):
        raise UserError("the model has a block of which only a part is in int8; save it again")
    return stored
