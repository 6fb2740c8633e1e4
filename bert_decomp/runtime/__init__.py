"""The inference form of a low-rank model: the same numbers up to rounding, with what slows them down removed.

Between a fast operator and a fast model lie padding, unaligned ranks, fresh tensors for every activation, and a last
layer of which one token is read. ``fuse_`` takes them out: an encoder whose architecture is known becomes one
``FusedEncoder``; in any other each factored layer is packed by itself. Saved files never have this form.

What is swapped is data: ``REPLACEMENTS`` maps the type of a module inside an encoder layer to its inference form, and
``Family.attention_norm`` says that the whole encoder has one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..models.architectures import FAMILIES, encoder_layers
from .encoder import FusedEncoder, check_call, encoder_name
from .linears import PackedLinear
from .replacement import Replacement


class InPlaceGELU(Replacement):
    """GELU (erf) that overwrites its input, which in an encoder layer nothing else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


# Inside the layers of an encoder that has no inference form of its own.
REPLACEMENTS: dict[type[nn.Module], type[Replacement]] = {
    LowRankLinear: PackedLinear,
    GELUActivation: InPlaceGELU,
}


def fuse_(model: nn.Module, pack: bool = True) -> nn.Module:
    """Turn a low-rank model into its inference form, in place, and return it in evaluation mode.

    Logits equal the unfused model's up to rounding. Hidden states and attentions of single layers are no longer to be had,
    and tokens of padding come out as zeros.

    Args:
        pack: drop padding, where the architecture is known and sentences are padded on the right.

    Raises:
        UserError: the model has no factored layer, or is in this form already.
    """
    if any(isinstance(module, Replacement) for module in model.modules()):
        raise UserError("the model is fused already; unfuse_ puts it back")
    if not any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise UserError("the model has no factored layer to fuse; decompose it first")
    model.eval()
    layers = encoder_layers(model)
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.attention_norm is not None:
        name = encoder_name(model)
        first_only = (
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
            == type(model).__name__
        )
        encoder = FusedEncoder(
            model.get_submodule(name), model, list(layers.values()), first_only, pack
        )
        model.base_model.register_forward_pre_hook(check_call, with_kwargs=True)
        model.set_submodule(name, encoder)
        return model
    for layer_name, layer in layers.items():
        for name, module in list(layer.named_modules()):
            if type(module) in REPLACEMENTS:
                model.set_submodule(f"{layer_name}.{name}", REPLACEMENTS[type(module)](module))
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Put back what ``fuse_`` took out, in place, and return the model."""
    fused = {
        name: module for name, module in model.named_modules() if isinstance(module, Replacement)
    }
    for name, module in fused.items():
        module.release()
        if not any(name.startswith(f"{outer}.") for outer in fused):
            model.set_submodule(name, module.source)
    base = model.base_model
    for key in [key for key, hook in base._forward_pre_hooks.items() if hook is check_call]:
        del base._forward_pre_hooks[key], base._forward_pre_hooks_with_kwargs[key]
    return model
