"""The inference form of a low-rank model: the same numbers up to rounding, with what slows them down removed.

On a CPU two library matmuls are at their floor only if their shapes are kind: a rank such as 245 leaves every row
unaligned, and fresh tensors of several megabytes for activations and attention scores cost more in page faults than in
arithmetic. So the factors are packed (rank padded with zeros to a multiple of 16), activations overwrite their input, and
attention that a family writes out by hand becomes one library call. Saved files never have this form.

What is swapped is data: ``REPLACEMENTS`` maps the type of a module inside an encoder layer to its inference form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from lowrank_kernels import LowRankLinear, pack_factors

from .errors import UserError
from .families import encoder_layers


class _Replacement(nn.Module):
    """An inference form that remembers the module it stands for."""

    def __init__(self, source: nn.Module):
        super().__init__()
        # In a list, so that it is not a submodule: it is what unfuse_ puts back.
        self._source = [source]

    @property
    def source(self) -> nn.Module:
        return self._source[0]


class PackedLinear(_Replacement):
    """A ``LowRankLinear`` with its rank padded to a multiple of 16; no gradients, nothing to save."""

    def __init__(self, source: LowRankLinear):
        super().__init__(source)
        down, up = pack_factors(source.down, source.up)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)


class InPlaceGELU(_Replacement):
    """GELU (erf) that overwrites its input, which in an encoder layer nothing else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class LibraryMPNetAttention(_Replacement):
    """MPNet's self-attention with the library's attention kernel in the place of its written-out one.

    The relative position bias joins the mask. Attention probabilities exist only in the original, which is therefore
    called when they are asked for.
    """

    def __init__(self, source: MPNetSelfAttention):
        super().__init__(source)
        self.q, self.k, self.v, self.o = source.q, source.k, source.v, source.o

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
                output_attentions: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
        if output_attentions:
            return self.source(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        heads = self.source.num_attention_heads
        query, key, value = (project(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
                             for project in (self.q, self.k, self.v))
        terms = [term for term in (position_bias, attention_mask) if term is not None]
        mask = sum(terms[1:], terms[0]) if terms else None
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return (self.o(context.transpose(1, 2).flatten(2)),)


# Attention comes last: its replacement takes over projections that are packed by then.
REPLACEMENTS: dict[type[nn.Module], type[_Replacement]] = {
    LowRankLinear: PackedLinear,
    GELUActivation: InPlaceGELU,
    MPNetSelfAttention: LibraryMPNetAttention,
}


def fuse_(model: nn.Module) -> nn.Module:
    """Turn a low-rank model on a CPU into its inference form, in place, and return it in evaluation mode.

    On a GPU the layers stay as they are and the dispatcher of ``lowrank_kernels`` picks their backend.

    Raises:
        UserError: the model has no factored layer, or is in this form already.
    """
    if any(isinstance(module, _Replacement) for module in model.modules()):
        raise UserError("the model is fused already; unfuse_ puts it back")
    factored = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    if not factored:
        raise UserError("the model has no factored layer to fuse; decompose it first")
    model.eval()
    if factored[0].down.device.type != "cpu":
        return model
    for kind, replacement in REPLACEMENTS.items():
        for layer_name, layer in encoder_layers(model).items():
            for name, module in list(layer.named_modules()):
                if type(module) is kind:
                    model.set_submodule(f"{layer_name}.{name}", replacement(module).eval())
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Put back what ``fuse_`` took out, in place, and return the model."""
    # Outermost first: what an outer module holds is then reached through the module put back.
    for kind in reversed(REPLACEMENTS.values()):
        for name, module in list(model.named_modules()):
            if type(module) is kind:
                model.set_submodule(name, module.source)
    return model
