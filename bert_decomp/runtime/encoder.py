"""A whole encoder in its inference form: tokens without padding, fused operators, and only what the head reads.

One class serves every architecture whose layers normalise after each half (BERT, RoBERTa, ELECTRA, DistilBERT, MPNet):
where its parts are is the architecture's row in ``families``. A sequence classifier reads the first token alone, so the
last layer computes keys and values of all tokens and everything else of one a sentence.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lowrank_kernels.inference import Prepared

from ..errors import UserError
from ..models.architectures import (
    FAMILIES,
    encoder_layers,
)
from ..models.replacement import Replacement
from .blocks import Attention, Block, QueryKeyValue, Workspace
from .compiled import CompiledEncoder
from .int8 import Quality
from .int8_blocks import Int8Block
from .layer import FusedLayer
from .linears import single_operators
from .quantised import Int8Linear
from .sequences import arrange, real_lengths

if TYPE_CHECKING:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

logger = logging.getLogger("bert_decomp")


Step = TypeVar("Step", bound=nn.Module)
# Of this thread: ``encoders`` whose classifiers are in the middle of a forward pass.
_CALLED = threading.local()


class FusedEncoder(Replacement):
    """The inference form of an encoder: ``model`` it belongs to, ``first_only`` if its head reads first tokens alone.

    It hands over the last layer's output and nothing of the layers before; padding comes out as zeros.
    """

    def __init__(
        self,
        source: nn.Module,
        model: PreTrainedModel,
        layers: list[nn.Module],
        first_only: bool,
        unpad: bool,
    ):
        super().__init__(source)
        config, family = model.config, FAMILIES[model.config.model_type]
        activation = getattr(config, "hidden_act", None) or config.activation
        self.first_only, self.unpad = first_only, unpad
        # Whether every mask is known to start its rows and to have no gap; whoever sets it has looked.
        self.prefix = False
        self.layers = nn.ModuleList(
            FusedLayer(layer, family, config.num_attention_heads, activation) for layer in layers
        )
        self.family = family
        # Of the layers inside the source.
        self.names = [name for name, module in source.named_modules() if module in layers]
        # MPNet's: held here as well, so that it moves with this module.
        self.relative_attention_bias = getattr(source, "relative_attention_bias", None)
        # Counts what makes other tensors, or other values, of the parameters.
        self.version = 0
        # What int8 changes (see ``int8.quantise_``); None if nothing is int8.
        self.quality: Quality | None = None
        # The int8 layers in the compiled kernels (see ``compile_layers``), or None.
        self.compiled: CompiledEncoder | None = None

    def stored(self) -> dict[str, nn.Module]:
        return {
            f"{name}.{getattr(self.family, part)}": linear
            for name, layer in zip(self.names, self.layers, strict=True)
            for block in layer.children()
            if isinstance(block, Int8Block)
            for part, linear in block.stored().items()
        }

    def compile_layers(self, embeddings: nn.Module | None = None) -> None:
        """Run the layers, int8 by now, in the compiled CPU kernels, where these can; and the ``embeddings``, if their
        output is what the first layer reads."""
        try:
            self.compiled = CompiledEncoder(self.layers, embeddings=embeddings)
        except ValueError as error:
            logger.info("int8: by library calls, because %s", error)
            return
        # Packed once more for the kernels; the library's own copies are made again if they are ever needed.
        for module in self.layers.modules():
            if isinstance(module, Int8Linear):
                for product in module.products:
                    product.unpack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedEncoder:
        if self.quality is not None:
            probe = fn(torch.empty(0))
            if probe.device.type != "cpu" or probe.dtype != torch.float32:
                raise UserError(
                    "an int8 model cannot be moved or cast"
                    + ("" if self.from_file else "; unfuse_ it first")
                )
        self.version += 1
        return super()._apply(fn, recurse)

    def refresh(self) -> None:
        self.version += 1
        for step in self._steps(QueryKeyValue):
            step.stack()

    def release(self) -> None:
        for step in self._steps(QueryKeyValue):
            step.unstack()

    def _steps(self, kind: type[Step]) -> list[Step]:
        return [step for step in self.layers.modules() if isinstance(step, kind)]

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.quality is None:
            super()._load_from_state_dict(*args)
        else:
            args[-1].append(
                "an int8 model takes no other weights"
                + ("" if self.from_file else "; unfuse_ it first")
            )

    def operators(self) -> list[Prepared]:
        """The operators that are called in a forward pass."""
        steps = self._steps(Block)
        if self.relative_attention_bias is not None:
            # Added to the scores, which library calls alone do.
            steps = [step for step in steps if not isinstance(step, Attention)]
        result = [operator for step in steps for operator in step.operators()]
        last = self.layers[-1]
        if self.first_only and isinstance(last, FusedLayer) and last.query_key_value is not None:
            result += single_operators(last.query_key_value)
        return result

    def position_bias(self, length: int, device: torch.device) -> Tensor | None:
        """(1, heads, length, length), the same for every sentence, or None."""
        if self.relative_attention_bias is None:
            return None
        source: MPNetEncoder = self.source
        return source.compute_position_bias(torch.empty(1, length, 0, device=device))

    def wants_first(self) -> bool:
        """Whether first tokens alone are asked for, by the classifier that is in the middle of a forward pass."""
        return self.first_only and (
            torch.compiler.is_compiling() or self in getattr(_CALLED, "encoders", ())
        )

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **ignored: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        bias = self.position_bias(hidden_states.shape[1], hidden_states.device)
        first_only = self.wants_first()
        if self.compiled is not None and not torch.compiler.is_compiling():
            lengths = real_lengths(hidden_states.shape, attention_mask, self.unpad)
            if lengths is not None:
                return BaseModelOutputWithPastAndCrossAttentions(
                    last_hidden_state=self.compiled.native(hidden_states, lengths, bias, first_only)
                )
        sequences = arrange(hidden_states, attention_mask, self.unpad, self.prefix)
        rows = sequences.rows(hidden_states)
        # A compiler plans its own buffers, and a GPU's allocator keeps its.
        workspace = (
            Workspace() if rows.device.type == "cpu" and not torch.compiler.is_compiling() else None
        )
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            rows = layer(rows, sequences, bias, first_only and index == last, workspace)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=sequences.batch(rows))


def call_for_first_(model: PreTrainedModel, encoder: FusedEncoder) -> None:
    """Let ``encoder`` compute first tokens alone where ``model``, its classifier, calls it; whoever calls the bare
    encoder model gets all tokens."""
    forward = partial(_forward_for_first, model, encoder)
    # Trainer and pipelines look at the arguments.
    vars(forward)["__wrapped__"] = MethodType(type(model).forward, model)
    vars(model)["forward"] = forward


def _forward_for_first(
    model: PreTrainedModel, encoder: FusedEncoder, *args: Any, **kwargs: Any
) -> Any:
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **kwargs)
    before = getattr(_CALLED, "encoders", ())
    _CALLED.encoders = (*before, encoder)
    try:
        return type(model).forward(model, *args, **kwargs)
    finally:
        _CALLED.encoders = before


def encoder_name(model: nn.Module) -> str:
    """Qualified name of the module that runs the encoder's layers."""
    return next(iter(encoder_layers(model))).rsplit(".", 2)[0]
