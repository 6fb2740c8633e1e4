"""How a bare encoder model is called when its encoder is fused: checked, and where the encoder is compiled, from token
ids on past the code of the model's class.

A small encoder in int8 takes about a millisecond for a sentence, and masks, checks and output classes took half as much
again. What a call asks beyond ids, mask and token types goes the long way, and so does all that somebody's hooks watch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import ModelOutput

from ..errors import UserError
from ..models.architectures import longest_input
from .encoder import FusedEncoder
from .sequences import real_lengths

# Arguments of an encoder model that the runtime understands; of a bare one the first two by their place, too.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# What the inference form does not have.
REFUSED = ("output_hidden_states", "output_attentions")
CPU = torch.device("cpu")


def replace_forward_(base: PreTrainedModel, encoder: FusedEncoder) -> None:
    """Let ``base`` be called this way. Hooks would not see a call of ``forward`` itself."""
    vars(base)["forward"] = partial(_forward, base, encoder, longest_input(base))


def _forward(
    base: PreTrainedModel, encoder: FusedEncoder, limit: int | None, *args: Any, **kwargs: Any
) -> Any:
    check_call(base, limit, args, kwargs)
    output = _from_ids(base, encoder, args, kwargs)
    return type(base).forward(base, *args, **kwargs) if output is None else output


def check_call(
    base: PreTrainedModel, limit: int | None, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Refuse what the inference form does not compute, before the forward pass of the bare encoder model, which takes
    ``limit`` tokens.

    Raises:
        UserError: hidden states or attentions are asked for, the input is too long, or the mask is not (batch, length).
    """
    for name in REFUSED:
        if kwargs.get(name) if kwargs.get(name) is not None else getattr(base.config, name, False):
            raise UserError(
                f"a fused model keeps no {name.removeprefix('output_').replace('_', ' ')}; unfuse_ it first"
            )
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if torch.is_tensor(mask) and mask.ndim != 2:
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)}; a fused model needs (batch, length)"
        )
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None and limit is not None and ids.shape[-1] > limit:
        raise UserError(
            f"the input is {ids.shape[-1]} tokens long and the model takes {limit}; truncate it"
        )


def _tensors(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The inputs of a call by name, or None if it asks for anything else."""
    by_place = dict(zip(INPUTS[:2], args, strict=False))
    given = {name: x for name, x in {**kwargs, **by_place}.items() if x is not None}
    for name in REFUSED:
        given.pop(name, None)
    ids, as_dict = given.get("input_ids"), given.pop("return_dict", True)
    # What the class itself would refuse is left to it.
    if len(args) > 2 or set(by_place) & set(kwargs) or not as_dict or set(given) - set(INPUTS):
        return None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    same = [
        isinstance(x, Tensor) and (x.shape, x.device) == (ids.shape, CPU) for x in given.values()
    ]
    return given if all(same) else None


def _is_watched(*modules: torch.nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in modules)


def _from_ids(
    base: PreTrainedModel, encoder: FusedEncoder, args: tuple, kwargs: dict[str, Any]
) -> ModelOutput | None:
    """What ``base``, a bare encoder model, gives for a call, or None where it must go the long way."""
    compiled, embeddings = encoder.compiled, getattr(base, "embeddings", None)
    if compiled is None or torch.compiler.is_compiling() or base.training:
        return None
    if _is_watched(encoder, *base.children()):
        return None
    given = _tensors(args, kwargs)
    if given is None or not getattr(base.config, "return_dict", True):
        return None
    ids, mask, types = (given["input_ids"], *map(given.get, INPUTS[1:]))
    if not compiled.takes_ids(embeddings, types is not None):
        return None
    lengths = real_lengths(ids.shape, mask, encoder.unpad)
    if lengths is None:
        return None
    bias = encoder.position_bias(ids.shape[1], ids.device)
    hidden = compiled.native.from_ids(ids, lengths, types, bias, encoder.wants_first())
    pooler = getattr(base, "pooler", None)
    if pooler is None:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=hidden, pooler_output=pooler(hidden)
    )
