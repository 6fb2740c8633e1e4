"""What the parts of every encoder layer compute, recorded while a model runs as it always does.

Attention keeps whatever kernel the model uses: scores are made a second time from query and key, and only for terms
that ask for them. Where each part is comes from the family's row in ``families.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from ..errors import UserError
from ..models.architectures import FAMILIES, LINEARS, Family, attention_window, encoder_layers

# A linear layer's feature is its output.
FEATURES = (*LINEARS, "context", "hidden", "scores")


def attention_scores(
    query: Tensor, key: Tensor, heads: int, position: str | None = None, value: Any = None
) -> Tensor:
    """Scaled scores (batch, heads, tokens, tokens) before mask and softmax, from (batch, tokens, width) projections.

    Args:
        position: how ``value`` enters, as ``Family.position`` says: ``position_bias`` is (batch, heads, tokens,
            tokens), ``position_embeddings`` a pair of (batch, tokens, head width).
    """
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    if position == "position_embeddings":
        query, key = apply_rotary_pos_emb(query, key, *value)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores + value if position == "position_bias" else scores


@dataclass
class Features:
    """What one forward pass recorded.

    ``tensors`` is feature -> layer -> (batch, tokens, width); ``positions`` is layer -> what entered its attention.
    """

    heads: int
    position: str | None
    tensors: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    positions: dict[int, Any] = field(default_factory=dict)
    _scores: dict[int, Tensor] = field(default_factory=dict)

    def get(self, name: str, layer: int) -> Tensor:
        """One feature of one layer; ``scores`` are made at the first call and shared by the terms that use them."""
        if name != "scores":
            return self.tensors[name][layer]
        if layer not in self._scores:
            self._scores[layer] = attention_scores(
                self.tensors["query"][layer],
                self.tensors["key"][layer],
                self.heads,
                self.position,
                self.positions.get(layer),
            )
        return self._scores[layer]

    def forget_scores(self) -> None:
        """Free the scores, which are made again when they are asked for: they are larger than what they are made of."""
        self._scores.clear()


class FeatureCapture:
    """Records features while a model runs; ``close`` removes its hooks.

    Args:
        features: some of ``FEATURES``; nothing else is kept.

    Raises:
        UserError: the architecture does not offer a feature.
    """

    def __init__(self, model: PreTrainedModel, features: set[str]):
        self._handles: list[Any] = []
        self.layers = list(encoder_layers(model).values())
        family = FAMILIES.get(model.config.model_type)
        inner = features - {"hidden"}
        if inner and family is None:
            raise UserError(
                f"{model.config.model_type} is an architecture without a row in bert_decomp/models/architectures.py: "
                f"it offers the terms hidden, logits and task, not those that need {', '.join(sorted(inner))}; "
                "use distillation_preset light"
            )
        if features and not self.layers:
            raise UserError(
                f"{model.config.model_type} has no list of encoder layers; only the terms logits and task work"
            )
        self._heads = model.config.num_attention_heads
        self._position = None if family is None else family.position
        self._features = Features(self._heads, self._position)
        for index, layer in enumerate(self.layers):
            if "hidden" in features:
                self._on_output(layer, "hidden", index, _identity)
            if family is not None:
                self._watch_parts(layer, family, inner, index)

    def _watch_parts(
        self, layer: nn.Module, family: Family, features: set[str], index: int
    ) -> None:
        """Record what the parts of one layer compute, named by the family's row."""
        roles = features & set(LINEARS) | ({"query", "key"} if "scores" in features else set())
        for role in sorted(roles):
            part: Callable[[Tensor], Tensor] = _identity
            if role in ("query", "key", "value") and family.query == family.key:
                part = _third(("query", "key", "value").index(role))
            self._on_output(layer.get_submodule(getattr(family, role)), role, index, part)
        if "context" in features:
            self._on_input(layer.get_submodule(family.attention_output), "context", index)
        if "scores" in features and family.position:
            self._on_argument(layer, family.position, index)

    def _record(self, name: str, index: int, tensor: Tensor) -> None:
        self._features.tensors.setdefault(name, {})[index] = tensor

    def _on_output(
        self, module: nn.Module, name: str, index: int, part: Callable[[Tensor], Tensor]
    ) -> None:
        def record(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            self._record(name, index, part(output[0] if isinstance(output, tuple) else output))

        self._handles.append(module.register_forward_hook(record))

    def _on_input(self, module: nn.Module, name: str, index: int) -> None:
        def record(_module: nn.Module, inputs: tuple) -> None:
            self._record(name, index, inputs[0])

        self._handles.append(module.register_forward_pre_hook(record))

    def _on_argument(self, layer: nn.Module, name: str, index: int) -> None:
        signature = inspect.signature(layer.forward)

        def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._features.positions[index] = signature.bind(*args, **kwargs).arguments[name]

        self._handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))

    def take(self) -> Features:
        """Hand over what the last forward pass recorded, and forget it."""
        features, self._features = self._features, Features(self._heads, self._position)
        return features

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _third(which: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3, dim=-1)[which]


def pair_mask(attention_mask: Tensor, window: int | None) -> Tensor:
    """Which keys each token attends to: bool (batch, 1, tokens, tokens); rows of padding are all False."""
    real = attention_mask.bool()
    mask = real[:, None, :, None] & real[:, None, None, :]
    if window is not None:
        place = torch.arange(real.shape[1], device=real.device)
        mask = mask & ((place[:, None] - place[None, :]).abs() <= window)
    return mask


@dataclass
class Masks:
    """The real tokens of a batch, as the terms need them: bool (batch, tokens, 1), and pairs by layer."""

    attention_mask: Tensor
    config: Any
    _pairs: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        return self.attention_mask.bool()[:, :, None]

    def pairs(self, layer: int) -> Tensor:
        window = attention_window(self.config, layer)
        if window not in self._pairs:
            self._pairs[window] = pair_mask(self.attention_mask, window)
        return self._pairs[window]
