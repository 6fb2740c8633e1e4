"""Layers of other sizes padded with zeros to those of their architecture, which changes no output.

A head that was kept stands at its own index among heads of zeros, whose values are zero, so that the output layer sees
nothing of them; scores and values of a smaller head are followed by zeros. The architecture divides scores by the root
of its own head size, so the query is multiplied by the root of the ratio. The output weights of added neurons are zero,
whatever their activation gives. A sub-layer that was dropped has weights of zero and the bias that is left of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.architectures import FAMILIES, LINEARS, Family, encoder_layers, submodule
from ..models.resized import (
    RESIZED,
    Constant,
    Removed,
    ResizedAttention,
    attention_name,
)


def architecture_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the config alone describes, without memory for its weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@torch.no_grad()
def pad_(model: PreTrainedModel) -> None:
    """Give every resized module of ``model`` the size of its architecture, in place.

    Args:
        model: its factors multiplied out already.

    Raises:
        UserError: a module is resized that no row of ``FAMILIES`` names.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        plain = architecture_of(model)
        for name, layer in encoder_layers(model).items():
            _pad_layer(layer, plain.get_submodule(name), family, model)
    for name, module in model.named_modules():
        if isinstance(module, RESIZED):
            raise UserError(
                f"{name} has another size than the architecture gives it, which no plain model has; "
                "export it to onnx instead"
            )


def _pad_layer(layer: nn.Module, plain: nn.Module, family: Family, model: PreTrainedModel) -> None:
    """``layer`` becomes as large as ``plain``, the architecture's own."""
    width = submodule(plain, family.attention_output, nn.Linear).in_features
    head_size = width // model.config.num_attention_heads
    attention = layer.get_submodule(attention_name(family))
    scores: Sequence[int] = range(_columns(layer, family.attention_output))
    values = scores
    scale = 1.0
    if isinstance(attention, ResizedAttention):
        scores, values = (
            [head * head_size + place for head in attention.heads for place in range(size)]
            for size in (attention.score_size, attention.value_size)
        )
        scale = math.sqrt(head_size / attention.score_size)
        _restore_class_(attention)
    neurons = range(_columns(layer, family.ffn_output))
    # Places of the rows that are kept, of the columns that are kept (None: all), and a factor.
    places: dict[str, tuple[Sequence[int] | None, Sequence[int] | None, float]] = {
        "query": (scores, None, scale),
        "key": (scores, None, 1.0),
        "value": (values, None, 1.0),
        "attention_output": (None, values, 1.0),
        "ffn_intermediate": (neurons, None, 1.0),
        "ffn_output": (None, neurons, 1.0),
    }
    padded = {}
    for part in LINEARS:
        name = getattr(family, part)
        module, whole = layer.get_submodule(name), submodule(plain, name, nn.Linear)
        if isinstance(module, RESIZED) or module.weight.shape != whole.weight.shape:
            padded[name] = _padded(module, whole, *places[part], model)
    for name, linear in padded.items():
        layer.set_submodule(name, linear.train(layer.training))


def _columns(layer: nn.Module, name: str) -> int:
    """Inputs of the linear layer ``name``; none of what is left of a dropped sub-layer."""
    if isinstance(layer.get_submodule(name), Constant):
        return 0
    return submodule(layer, name, nn.Linear).in_features


def _padded(
    module: nn.Module,
    whole: nn.Linear,
    rows: Sequence[int] | None,
    columns: Sequence[int] | None,
    scale: float,
    model: PreTrainedModel,
) -> nn.Linear:
    """A linear layer of the size of ``whole`` that has the values of ``module`` in the given places, else zeros."""
    weight = torch.zeros(whole.weight.shape, dtype=torch.float64, device=model.device)
    bias = weight.new_zeros(len(weight))
    if isinstance(module, Constant):
        bias.copy_(module.bias)
    elif not isinstance(module, Removed):
        assert isinstance(module, nn.Linear)
        kept = range(module.out_features) if rows is None else rows
        # Matrices in one: query, key and value, or a gate and what it gates.
        joint = module.out_features // len(kept)
        step = len(weight) // joint
        down = torch.tensor([part * step + row for part in range(joint) for row in kept])
        across = torch.tensor(range(module.in_features) if columns is None else list(columns))
        weight[down[:, None], across] = module.weight.double() * scale
        if module.bias is not None:
            bias[down] = module.bias.double() * scale
    has_bias = whole.bias is not None or getattr(module, "bias", None) is not None
    linear = nn.Linear(whole.in_features, whole.out_features, has_bias, "meta")
    linear.weight = nn.Parameter(weight.to(model.dtype))
    if has_bias:
        linear.bias = nn.Parameter(bias.to(model.dtype))
    return linear


def _restore_class_(attention: ResizedAttention) -> None:
    """Make it an instance of the architecture's own class again."""
    for name in ("heads", "score_size", "value_size", "parts"):
        delattr(attention, name)
    # The second base of the class that resize_attention_ made.
    attention.__class__ = type(attention).__bases__[1]
