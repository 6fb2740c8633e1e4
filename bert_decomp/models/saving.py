"""Saving and loading low-rank models through transformers' registered quantizer interface.

After ``import bert_decomp`` a folder written by ``save`` (or by the model's own ``save_pretrained``) loads with
``AutoModelForSequenceClassification.from_pretrained(folder)``: the folder's ``config.json`` holds the rank of every
factored module, the registered quantizer swaps those modules before the weights are read, and safetensors holds the
factors. No code is loaded from the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..io.atomic import atomic_folder
from .architectures import FAMILIES
from .embedding import LowRankEmbedding
from .resized import RESIZED, check_resized, describe, is_description, rebuild_

FORMAT_VERSION = 1
FACTORED = (LowRankLinear, LowRankEmbedding)


@register_quantization_config("low_rank")
class LowRankConfig(QuantizationConfigMixin):
    """What must be known to rebuild the factored modules before their weights are read.

    Args:
        modules: for each factored module's qualified name ``{"rank": int, "bias": bool}``. The bias is part of the
            plan because a centred method adds one to a layer that had none. A factored word embedding always has one.
            A resized module has its sizes (see ``resized``), and a factored one among them ``in_features`` and
            ``out_features`` besides.
        version: of this format.

    Raises:
        UserError: the format is of another version, or an entry is malformed.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        **ignored: Any,
    ):
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"low-rank format version {version!r} is not {FORMAT_VERSION}; "
                "load the model with the bert_decomp that wrote it"
            )
        self.quant_method = "low_rank"
        self.version = version
        self.modules = {} if modules is None else modules
        if not isinstance(self.modules, dict):
            raise UserError("the model's config has low-rank modules that are not a table of names")
        for name, entry in self.modules.items():
            if is_description(entry):
                continue
            # type(), because True is an int, too.
            if not (
                isinstance(entry, dict)
                and type(entry.get("rank")) is int
                and entry["rank"] >= 1
                and isinstance(entry.get("bias"), bool)
                and all(
                    type(entry.get(size, 1)) is int and entry.get(size, 1) >= 1
                    for size in ("in_features", "out_features")
                )
            ):
                raise UserError(
                    f"the model's config has a malformed low-rank entry for {name}: {entry!r}"
                )

    @classmethod
    def of(cls, model: nn.Module) -> LowRankConfig:
        """Describe the factored and resized modules that ``model`` has now."""
        modules = dict(model.named_modules())
        # Only beside resized modules may a factored one have other sizes than its architecture says.
        resized = any(isinstance(module, RESIZED) for module in modules.values())
        entries: dict[str, dict[str, Any]] = {}
        for name, module in modules.items():
            if isinstance(module, FACTORED):
                entries[name] = {"rank": module.rank, "bias": module.bias is not None}
                if resized and isinstance(module, LowRankLinear):
                    entries[name]["in_features"] = module.in_features
                    entries[name]["out_features"] = module.out_features
            elif (entry := describe(module)) is not None:
                entries[name] = entry
        return cls(entries)


@register_quantizer("low_rank")
class LowRankQuantizer(HfQuantizer):
    """Swaps the modules named in a ``LowRankConfig`` before the weights are loaded. The result is trainable."""

    requires_calibration = True
    is_trainable = True
    # Without this Trainer refuses a loaded model: to it every quantizer is frozen unless it says otherwise.
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, **ignored: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **ignored: Any) -> None:
        swap_(model, self.quantization_config)


def swap_(model: nn.Module, config: LowRankConfig) -> None:
    """Put low-rank and resized modules, yet without values, in the places that ``config`` names.

    Raises:
        UserError: one of them is no linear layer of ``model``, or cannot have that rank or those sizes.
    """
    modules = dict(model.named_modules())
    family = FAMILIES.get(getattr(model.config, "model_type", None))
    for name, entry in config.modules.items():
        if is_description(entry):
            rebuild_(model, name, entry, family)
            _skip_initialisation(model, name)
            continue
        dense = modules.get(name)
        is_embedding = type(dense) is nn.Embedding and dense is model.get_input_embeddings()
        if type(dense) is not nn.Linear and not is_embedding:
            raise UserError(
                f"the model's config factors {name}, not a linear layer of this architecture"
            )
        columns, rows = (
            (dense.num_embeddings, dense.embedding_dim)
            if is_embedding
            else (
                min(dense.in_features, entry.get("in_features", dense.in_features)),
                min(dense.out_features, entry.get("out_features", dense.out_features)),
            )
        )
        if entry["rank"] > min(columns, rows):
            raise UserError(
                f"the model's config gives {name} ({columns}x{rows}) rank {entry['rank']}, more than full rank"
            )
        place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        low_rank = (
            LowRankEmbedding(columns, rows, entry["rank"], dense.padding_idx, **place)
            if is_embedding
            else LowRankLinear(columns, rows, entry["rank"], bias=entry["bias"], **place)
        )
        model.set_submodule(name, low_rank)
        _skip_initialisation(model, name)
    check_resized(model)


def _skip_initialisation(model: nn.Module, name: str) -> None:
    """Keep transformers from initialising the modules around a factored one: some families reach for its ``weight``. What
    has buffers that no file holds, such as positions, must be initialised and is left to do so."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = model.get_submodule(".".join(parts[:end]))
        if not isinstance(module, PreTrainedModel) and not module._non_persistent_buffers_set:
            module._is_hf_initialized = True


def mark_low_rank(model: PreTrainedModel) -> None:
    """Record in ``model`` which of its modules are factored, so that its own ``save_pretrained`` writes all of it."""
    config = LowRankConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path
) -> None:
    """Write model and tokenizer to ``folder``, whole or not at all. Weights are safetensors.

    Raises:
        UserError: the folder cannot be written.
    """
    if any(isinstance(module, (*FACTORED, *RESIZED)) for module in model.modules()):
        mark_low_rank(model)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
