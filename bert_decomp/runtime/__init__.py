"""The inference form of an encoder, low-rank or dense: the same numbers up to rounding, faster.

Between a fast operator and a fast model lie padding, unaligned ranks, fresh tensors for every activation, and a last
layer of which one token is read. ``fuse_`` takes them out: an encoder whose architecture is known becomes one
``FusedEncoder``; in any other each factored layer is aligned by itself. Saved files have this form only in int8.

What is swapped is data: ``REPLACEMENTS`` maps the type of a module inside an encoder layer to its inference form, and
``Family.attention_norm`` says that the whole encoder has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lowrank_kernels import LowRankLinear
from lowrank_kernels.calibration import ROWS, calibrate
from lowrank_kernels.inference import Prepared

from ..errors import UserError
from ..models.architectures import FAMILIES, encoder_layers
from ..models.format import LowRankConfig
from ..models.nested import refuse_several
from ..models.replacement import Replacement
from ..models.saving import mark_low_rank
from .calls import replace_forward_
from .encoder import FusedEncoder, call_for_first_, encoder_name
from .graphs import CudaRecorder, check_buckets, graph_
from .int8 import (
    Quality,
    check_batches,
    check_int8,
    quantise_,
    report,
)
from .linears import AlignedLinear, single_operators


class InPlaceGELU(Replacement):
    """GELU (erf) that overwrites its input, which in an encoder layer nothing else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


# Inside the layers of an encoder that has no inference form of its own.
REPLACEMENTS: dict[type[nn.Module], type[Replacement]] = {
    LowRankLinear: AlignedLinear,
    GELUActivation: InPlaceGELU,
}


def has_form(model: PreTrainedModel) -> bool:
    """Whether a model's whole encoder has an inference form, which CUDA graphs and int8 need.

    >>> from transformers import BertConfig, BertModel
    >>> has_form(BertModel(BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)))
    True
    """
    family = FAMILIES.get(model.config.model_type)
    return family is not None and family.attention_norm is not None


def fuse_(
    model: PreTrainedModel,
    unpad: bool = True,
    dtype: str | None = None,
    calibration: Sequence[dict[str, Tensor]] | None = None,
    graphs: Sequence[tuple[int, int]] | str = (),
) -> PreTrainedModel:
    """Turn a model into its inference form, in place, and return it in evaluation mode.

    On a GPU the first model of its kind is calibrated: its own matrices are measured, which takes seconds, and what was
    measured is kept in the user's cache (see ``lowrank_kernels.calibration``). So move the model there first.

    Linear layers may be factored, dense, or some of each. Logits equal the unfused model's up to rounding. Hidden
    states and attentions of single layers are not available, and padding tokens come out as zeros. A classifier's
    last layer is computed for first tokens alone; its ``base_model``, called by itself, gives every token.

    Args:
        model: an encoder of transformers, with or without a head.
        unpad: drop padding, where the architecture is known and sentences are padded on the right.
        dtype: "int8" for linear layers in 8 bits, on the CPU; None for the model's own dtype. The logits then differ,
            by how much is logged and kept as ``quality`` of the encoder (``int8.Quality``).
        calibration: for int8, batches of the model's inputs, (batch, length) token ids and masks, that its scales are
            set by and its quality is checked on: a few hundred sentences of the task.
        graphs: on a GPU, shapes (batch, length) of batches that are padded to the next of them and replayed from a CUDA
            graph, if gradients are off; "auto" for six common ones. Results follow the same definition.

    A model that was saved in int8 has its form already when it is loaded, and is returned as it is.

    Raises:
        UserError: the model is in this form already, or has nothing that this form would change, or cannot be int8.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2)
        >>> model = BertForSequenceClassification(config).eval()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]),
        ...          "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
        >>> before = model(**batch).logits
        >>> torch.allclose(fuse_(model)(**batch).logits, before, atol=1e-5)
        True
    """
    encoder = int8_encoder(model)
    if encoder is not None and encoder.quality is not None and encoder.from_file:
        if dtype is not None or calibration is not None or graphs:
            raise UserError(
                "the model was calibrated and saved in int8; leave dtype, calibration and graphs out"
            )
        report(encoder.quality)
        encoder.unpad = unpad
        return model.eval()
    if any(isinstance(module, Replacement) for module in model.modules()):
        raise UserError("the model is fused already; unfuse_ puts it back")
    refuse_several(model, "fused")
    if dtype not in (None, "int8"):
        raise UserError(f"dtype is {dtype!r}; it must be 'int8' or None, the model's own")
    layers, known = encoder_layers(model), has_form(model)
    saved = _saved_quality(model)
    if dtype == "int8" or saved is not None:
        check_int8(model, known)
    batches = check_batches(calibration) if dtype == "int8" else None
    if graphs and not known:
        raise UserError(f"{type(model).__name__} has no inference form that graphs could replay")
    buckets = check_buckets(model, graphs) if graphs else []
    if known:
        name = encoder_name(model)
        classifiers = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        first_only = classifiers.get(model.config.model_type) == type(model).__name__
        encoder = FusedEncoder(
            model.get_submodule(name), model, list(layers.values()), first_only, unpad
        )
        replace_forward_(model.base_model, encoder)
        if first_only:
            call_for_first_(model, encoder)
        model.set_submodule(name, encoder)
        model.eval()
        compile_layers = partial(encoder.compile_layers, _embeddings(model.base_model))
        if batches is not None:
            encoder.quality = quantise_(model, encoder.layers, batches, compile_layers)
            # The model's own save_pretrained writes int8, too.
            mark_low_rank(model)
        elif saved is not None:
            encoder.quality, encoder.from_file = saved, True
            compile_layers()
        else:
            _choose(encoder.operators(), model.device)
        if buckets:
            graph_(model, encoder, buckets, CudaRecorder(model.device))
        return model
    replaceable = {
        f"{layer_name}.{name}": module
        for layer_name, layer in layers.items()
        for name, module in layer.named_modules()
        if type(module) in REPLACEMENTS
    }
    if not replaceable:
        raise UserError(
            f"{type(model).__name__} has no inference form and no factored layer; decompose it first"
        )
    for name, module in replaceable.items():
        model.set_submodule(name, REPLACEMENTS[type(module)](module))
    _choose(single_operators(model), model.device)
    return model.eval()


def _embeddings(base: PreTrainedModel) -> nn.Module | None:
    """The module whose output the first layer reads, or None where more comes between them (ELECTRA's projection)."""
    projected = getattr(base, "embeddings_project", None) is not None
    return None if projected else getattr(base, "embeddings", None)


def _choose(operators: list[Prepared], device: torch.device) -> None:
    """Measure what is not known of the operators on a GPU, and prepare what is the fastest, before the first call."""
    calibrate([operator.problem for operator in operators], device)
    if device.type == "cuda":
        for operator in operators:
            operator.ready(ROWS)


def int8_encoder(model: nn.Module) -> FusedEncoder | None:
    """The fused encoder of a model that is int8; None in any other."""
    for module in model.modules():
        if isinstance(module, FusedEncoder) and module.quality is not None:
            return module
    return None


def _saved_quality(model: PreTrainedModel) -> Quality | None:
    """What a file says of the int8 model that was loaded of it just now."""
    # The config would do, but other models may be made of it.
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    found = config.int8 if isinstance(config, LowRankConfig) else None
    return None if found is None else Quality(**found)


def unfuse_(model: PreTrainedModel) -> PreTrainedModel:
    """Put back what ``fuse_`` took out, in place, and return the model.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1,
    ...     num_attention_heads=2, intermediate_size=48)).eval()
    >>> before = [name for name, _ in model.named_parameters()]
    >>> [name for name, _ in unfuse_(fuse_(model)).named_parameters()] == before
    True

    Raises:
        UserError: the model was loaded in int8, and there is nothing to put back.
    """
    encoder = int8_encoder(model)
    if encoder is not None and encoder.from_file:
        raise UserError(
            "the model was saved in int8 without its float32 weights; load the folder that it was made of"
        )
    fused = {
        name: module for name, module in model.named_modules() if isinstance(module, Replacement)
    }
    for name, module in fused.items():
        module.release()
        if not any(name.startswith(f"{outer}.") for outer in fused):
            model.set_submodule(name, module.source)
    for owner in (model, model.base_model):
        vars(owner).pop("forward", None)
    if encoder is not None:
        mark_low_rank(model)
    return model
