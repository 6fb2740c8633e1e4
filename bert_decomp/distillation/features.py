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
from ..models.resized import ResizedAttention, attention_name

# A linear layer's feature is its output.
FEATURES = (*LINEARS, "context", "hidden", "scores")


def attention_scores(
    query: Tensor,
    key: Tensor,
    heads: tuple[int, ...],
    position: str | None = None,
    value: Any = None,
) -> Tensor:
    """Scaled scores (batch, heads, tokens, tokens) before mask and softmax, from (batch, tokens, width) projections.

    Args:
        heads: which of the architecture's heads there are.
        position: how ``value`` enters, as ``Family.position`` says: ``position_bias`` is (batch, all heads, tokens,
            tokens), ``position_embeddings`` a pair of (batch, tokens, head width).
    """
    query, key = (x.unflatten(-1, (len(heads), -1)).transpose(1, 2) for x in (query, key))
    if position == "position_embeddings":
        query, key = apply_rotary_pos_emb(query, key, *value)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if position != "position_bias":
        return scores
    return scores + (value if value.shape[1] == len(heads) else value[:, list(heads)])


def heads_of(layer: nn.Module, family: Family, config: Any) -> tuple[int, ...]:
    """Which of the architecture's heads a layer has.

    Those of a joint projection are only counted: which ones were dropped is not kept.
    """
    attention = layer.get_submodule(attention_name(family))
    if isinstance(attention, ResizedAttention):
        return attention.heads
    count = config.num_attention_heads
    if family.query == family.key:
        count = layer.get_submodule(family.query).out_features * count // (3 * config.hidden_size)
    return tuple(range(count))


@dataclass
class Features:
    """What one forward pass recorded.

    ``heads`` are those that each layer has; ``tensors`` is feature -> layer -> (batch, tokens, width); ``positions`` is
    layer -> what entered its attention.
    """

    heads: list[tuple[int, ...]]
    position: str | None
    tensors: dict[str, dict[int, Tensor]]
    positions: dict[int, Any]
    _scores: dict[int, Tensor] = field(default_factory=dict)

    def get(self, name: str, layer: int) -> Tensor:
        """One feature of one layer; ``scores`` are made at the first call and shared by the terms that use them."""
        if name != "scores":
            return self.tensors[name][layer]
        if layer not in self._scores:
            self._scores[layer] = attention_scores(
                self.tensors["query"][layer],
                self.tensors["key"][layer],
                self.heads[layer],
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
        self._config, self._family = model.config, family
        self._with_scores = "scores" in features
        self._tensors: dict[str, dict[int, Tensor]] = {}
        self._positions: dict[int, Any] = {}
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
        self._tensors.setdefault(name, {})[index] = tensor

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
            self._positions[index] = signature.bind(*args, **kwargs).arguments[name]

        self._handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))

    def take(self) -> Features:
        """Hand over what the last forward pass recorded, and forget it."""
        heads, position = [], None
        if self._family is not None:
            position = self._family.position
            if self._with_scores:  # a nested model changes its heads between passes
                heads = [heads_of(layer, self._family, self._config) for layer in self.layers]
        features = Features(heads, position, self._tensors, self._positions)
        self._tensors, self._positions = {}, {}
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
