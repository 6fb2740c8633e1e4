"""A compressed model as a plain one: factors multiplied out, smaller layers padded with zeros.

For servers that know transformers' own models alone. Nothing of this project is needed to load the result, and nothing
is gained in size or speed.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..models.embedding import LowRankEmbedding
from ..models.format import refuse_fused
from ..models.nested import refuse_several
from .padding import architecture_of, pad_

# Config values that give linear layers a bias, for architectures that have none by default.
BIAS_SETTINGS = ("attention_bias", "mlp_bias")


@torch.no_grad()
def dense(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` in evaluation mode, with dense layers of the architecture's sizes in place of all others.

    Products are computed in float64 and rounded once to the model's dtype, so outputs agree up to rounding.

    Args:
        model: a model of transformers, with or without a head, in any floating-point dtype and on any device.

    Raises:
        UserError: the model is fused or has several sizes, or a layer has a size or a bias that its architecture has no
            place for.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from bert_decomp import DecompositionConfig, decompose_
        >>> model = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64,
        ...     num_hidden_layers=2)).eval()
        >>> _ = decompose_(model, DecompositionConfig("svd", rank=8), progress=False)
        >>> plain, ids = dense(model), torch.tensor([[5, 6, 7]])
        >>> torch.allclose(plain(ids)[0], model(ids)[0], atol=1e-4), type(plain.encoder.layer[0].output.dense)
        (True, <class 'torch.nn.modules.linear.Linear'>)
    """
    refuse_fused(model, "made dense")
    refuse_several(model, "made dense")
    modules = dict(model.named_modules())
    plain = copy.deepcopy(model)
    for name, module in modules.items():
        if isinstance(module, LowRankLinear):
            plain.set_submodule(name, _linear(module))
        elif isinstance(module, LowRankEmbedding):
            plain.set_submodule(name, _embedding(module))
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    vars(plain).pop("hf_quantizer", None)
    pad_(plain)
    _fit_biases(plain)
    return plain.eval()


def _linear(module: LowRankLinear) -> nn.Linear:
    weight = (module.up.double() @ module.down.double()).to(module.up.dtype)
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
    linear.weight = nn.Parameter(weight)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().clone())
    return linear


def _embedding(module: LowRankEmbedding) -> nn.Embedding:
    rows = module.codes.double() @ module.up.double().T + module.bias.double()
    weight = rows.to(module.up.dtype)
    return nn.Embedding(
        weight.shape[0], weight.shape[1], padding_idx=module.padding_idx, _weight=weight
    )


def _fit_biases(plain: PreTrainedModel) -> None:
    """Say in the config that layers have a bias where a centred method gave them one; the others get a bias of zero."""
    biases = {name for name, _ in plain.named_parameters() if name.endswith(".bias")}
    if not biases - _biases_of(plain):
        return
    for setting in BIAS_SETTINGS:
        if hasattr(plain.config, setting):
            setattr(plain.config, setting, True)
    places = _biases_of(plain)
    if extra := sorted(biases - places):
        raise UserError(
            f"{extra[0]} has no place in a plain {type(plain).__name__}; decompose with the method svd, "
            "which adds no bias"
        )
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in places:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


def _biases_of(plain: PreTrainedModel) -> set[str]:
    """The biases that the architecture has under the config of ``plain``."""
    twin = architecture_of(plain)
    return {name for name, _ in twin.named_parameters() if name.endswith(".bias")}
