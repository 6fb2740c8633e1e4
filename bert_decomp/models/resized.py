"""Modules of a model whose layers have other sizes than its config says: fewer or smaller heads, fewer neurons.

A resized module keeps the name, the child names and the interface of the module that it stands for, so that a saved
model loads through ``AutoModel``, trains in ``Trainer`` and records attentions as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from .architectures import Family
from .attention_size import AttentionSize


class ResizedLinear(nn.Linear):
    """A linear layer with other sizes, or with a bias where the architecture has none; otherwise ``nn.Linear``."""


class Constant(nn.Module):
    """What is left of a sub-layer that was dropped: its bias (out_features,), whatever the input (..., n).

    >>> Constant(3)(torch.ones(2, 5, 7)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, out_features: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


class ResizedAttention(nn.Module):
    """Self-attention with the dense model's ``heads`` that were kept, of ``score_size`` and ``value_size`` each.

    Mixed into the architecture's own class by ``resize_attention_``; ``parts`` names its linear layers by what they
    compute. Scores are divided by the square root of ``score_size``. Without heads, only the output layer's bias is
    left.
    """

    heads: tuple[int, ...]
    score_size: int
    value_size: int
    parts: dict[str, str]
    # By encoder fraction, falling, in a nested model.
    nested: Mapping[float, AttentionSize] = MappingProxyType({})
    # Of the architecture's own class. Without a config (MPNet's) it computes its scores itself.
    config: Any
    dropout: nn.Dropout

    def use(self, size: AttentionSize) -> None:
        """Have that size from now on."""
        self.heads, self.score_size, self.value_size = size.heads, size.score_size, size.value_size

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        if past_key_values is not None:
            raise UserError("resized attention is of encoders; it takes no past keys and values")
        context, probabilities = hidden_states, None
        if self.heads:
            context, probabilities = self._attend(
                hidden_states, attention_mask, position_bias, **kwargs
            )
        if "attention_output" in self.parts:
            context = self._part("attention_output", context)
        if hasattr(self, "config"):
            return context, probabilities
        # MPNet's hands over what it is asked for.
        return (context, probabilities) if output_attentions else (context,)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # No module has the mixed class under its name, so what is stored is how to make it.
        return _blank, (type(self).__bases__[1],), vars(self)

    def _part(self, part: str, x: Tensor) -> Tensor:
        return getattr(self, self.parts[part])(x)

    def _attend(
        self, x: Tensor, mask: Tensor | None, position_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            self._part(part, x).unflatten(-1, (len(self.heads), size)).transpose(1, 2)
            for part, size in (
                ("query", self.score_size),
                ("key", self.score_size),
                ("value", self.value_size),
            )
        )
        attend = _eager_attention
        if hasattr(self, "config"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, _eager_attention
            )
        elif position_bias is not None:
            bias = position_bias[:, list(self.heads)]
            mask = bias if mask is None else bias + mask
        context, probabilities = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.score_size**-0.5,
            **kwargs,
        )
        return context.flatten(-2), probabilities


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float,
    **ignored: Any,
) -> tuple[Tensor, Tensor]:
    """Context (batch, tokens, heads, value size) and probabilities, as transformers' own function gives them."""
    scores = query @ key.transpose(-1, -2) * scaling
    probabilities = (scores if mask is None else scores + mask).softmax(-1)
    probabilities = F.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


@cache
def _resized_class(original: type) -> type[nn.Module]:
    """``original`` with the forward pass of ``ResizedAttention``; its instances are still instances of ``original``."""
    return type(f"Resized{original.__name__}", (ResizedAttention, original), {})


def _blank(original: type) -> nn.Module:
    """A resized module yet without attributes, which copying and unpickling fill."""
    resized = _resized_class(original)
    return resized.__new__(resized)


def attention_name(family: Family) -> str:
    """Name, inside an encoder layer, of the module that holds query, key and value."""
    return family.query.rpartition(".")[0]


def resize_attention_(
    module: nn.Module, family: Family, heads: tuple[int, ...], score_size: int, value_size: int
) -> nn.Module:
    """Give a self-attention module other sizes, in place; its linear layers are left to the caller.

    Args:
        module: the architecture's own, or one resized before.
        family: its row in ``FAMILIES``, with query, key and value apart.
        heads: which of the dense model's heads it has.
    """
    inside = attention_name(family) + "."
    if not isinstance(module, ResizedAttention):
        original: type = type(module)
        module.__class__ = _resized_class(original)
        assert isinstance(module, ResizedAttention)
    module.heads, module.score_size, module.value_size = tuple(heads), score_size, value_size
    module.parts = {
        part: getattr(family, part).removeprefix(inside)
        for part in ("query", "key", "value", "attention_output")
        if getattr(family, part).startswith(inside)
        and "." not in getattr(family, part)[len(inside) :]
    }
    return module


class Removed(nn.Identity):
    """In the place of a linear layer of a sub-layer that was dropped."""


RESIZED = (ResizedAttention, ResizedLinear, Constant, Removed)
