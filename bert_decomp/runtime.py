"""The inference form of a low-rank model: the same numbers up to rounding, with what slows them down removed.

On a CPU two library matmuls are at their floor only if their shapes are kind: a rank such as 245 leaves every row
unaligned, and a fresh 12 MB tensor for each activation costs more in page faults than in arithmetic. So the factors are
packed (rank padded with zeros to a multiple of 16) and activations overwrite their input. Saved files never have this
form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lowrank_kernels import LowRankLinear, pack_factors
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .errors import UserError
from .families import encoder_layers


class PackedLinear(nn.Module):
    """A ``LowRankLinear`` for inference on a CPU: rank padded to a multiple of 16, no gradients, nothing to save."""

    def __init__(self, source: LowRankLinear):
        super().__init__()
        down, up = pack_factors(source.down, source.up)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach(), persistent=False)
        # In a list, so that it is not a submodule: it is what unfuse_ puts back.
        self._source = [source]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def original(self) -> nn.Module:
        return self._source[0]


class InPlaceGELU(nn.Module):
    """GELU (erf) that overwrites its input, which in an encoder layer nothing else reads."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self._source = [source]

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)

    def original(self) -> nn.Module:
        return self._source[0]


def fuse_(model: nn.Module) -> nn.Module:
    """Turn a low-rank model on a CPU into its inference form, in place, and return it in evaluation mode.

    On a GPU the layers stay as they are and the dispatcher of ``lowrank_kernels`` picks their backend.

    Raises:
        UserError: the model has no factored layer, or is in this form already.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError("the model is fused already; unfuse_ puts it back")
    factored = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not factored:
        raise UserError("the model has no factored layer to fuse; decompose it first")
    model.eval()
    if next(iter(factored.values())).down.device.type != "cpu":
        return model
    for name, module in factored.items():
        model.set_submodule(name, PackedLinear(module))
    for layer_name, layer in encoder_layers(model).items():
        for name, module in list(layer.named_modules()):
            if type(module) is GELUActivation:
                model.set_submodule(f"{layer_name}.{name}", InPlaceGELU(module))
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Put back what ``fuse_`` took out, in place, and return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (PackedLinear, InPlaceGELU)):
            model.set_submodule(name, module.original())
    return model
