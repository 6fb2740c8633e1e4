"""Saving and loading low-rank models through transformers' registered quantizer interface.

After ``import bert_decomp`` a folder written by ``save`` (or by the model's own ``save_pretrained``) loads with
``from_pretrained`` of every auto class, with or without a head: the folder's ``config.json`` holds the rank of every
factored module, the registered quantizer swaps those modules before the weights are read, and safetensors holds the
factors. No code is loaded from the folder. An int8 model is fused as soon as it is loaded. Of a nested model, which
serves several sizes, the argument ``encoder_fraction`` says which one is loaded (see ``nested``); transformers lets an
argument replace a value that is in the config, which is why the config of a nested model has one of that name.

Without the import transformers only warns of an unknown quantization type, leaves the modules dense and initialises
them randomly. So the weights hold one more tensor, ``PLACEHOLDER`` under the name of a dense weight: its shape fits no
dense model, and every loader refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer, register_quantizer

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..io.atomic import atomic_folder
from .architectures import FAMILIES
from .embedding import LowRankEmbedding
from .format import FACTORED, LowRankConfig, saved_modules, saved_state
from .int8 import QUANTISED, check_quantised, is_entry, rebuild_int8_
from .nested import ALL, NestedLinear, check_fraction, ranks_of, take_size_
from .nested_resized import attention_sizes, rebuild_nested_, resized_sizes
from .resized import Constant, Removed
from .resized_entries import check_resized, is_description, rebuild_

PLACEHOLDER = torch.zeros(0)
_ACCELERATORS = ("cuda", "xpu", "mps", "meta", "hpu", "npu", "disk")


@register_quantizer("low_rank")
class LowRankQuantizer(HfQuantizer):
    """Swaps the modules named in a ``LowRankConfig`` before the weights are loaded. The result is trainable."""

    requires_calibration = True
    is_trainable = True
    is_compileable = True

    def is_serializable(self, **ignored: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> None:
        fractions, wanted = self.quantization_config.fractions, _wanted_fraction(model)
        if fractions and wanted != ALL:
            check_fraction(fractions, wanted)
        swap_(model, self.quantization_config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.quantization_config.int8 is not None and dtype != torch.float32:
            raise UserError(f"the model is int8 beside float32; load it without dtype={dtype}")
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        if self.quantization_config.int8 is None or device_map is None:
            return device_map
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        # transformers' names for "wherever there is room" are no devices.
        if any(str(place).partition(":")[0] in _ACCELERATORS for place in places):
            raise UserError(
                f"an int8 model runs on the CPU; load it without device_map={device_map}"
            )
        return {"": "cpu"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> None:
        # The factors are plain floating-point numbers: .half(), .float() and training work as on any model, all of
        # which transformers refuses to models that it takes for quantized.
        model.is_quantized = False
        if self.quantization_config.int8 is not None:
            check_quantised(model.named_modules())
            # The inference form builds on this package; its public name is looked up when it is needed.
            from .. import fuse_

            fuse_(model)
        if self.quantization_config.fractions and _wanted_fraction(model) != ALL:
            take_size_(model, _wanted_fraction(model))
        mark_low_rank(model)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes, before it writes the config: the state dict, and the placeholder."""
        mark_low_rank(model)
        if getattr(model.config, "quantization_config", None) is None:
            return None, {}
        # Where there is none, another weight has a shape that fits no dense model.
        name = next(
            (name for name, module in saved_modules(model).items() if _is_placeable(module)),
            None,
        )
        placeholder = {} if name is None else {f"{name}.weight": PLACEHOLDER.to(model.dtype)}
        return {**saved_state(model), **placeholder}, {}


def swap_(model: PreTrainedModel, config: LowRankConfig) -> None:
    """Put low-rank and resized modules, yet without values, in the places that ``config`` names.

    The names are of the model that was saved: where that had a head and ``model`` has none, or the other way round,
    they differ by the base model's prefix.

    Raises:
        UserError: one of them is no linear layer of ``model``, or cannot have that rank or those sizes.
    """
    modules = dict(model.named_modules())
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
    for saved_name, entry in config.modules.items():
        name = resolve_name(saved_name, modules, getattr(model, "base_model_prefix", ""))
        if is_description(entry) or is_entry(entry):
            if is_entry(entry):
                rebuild_int8_(model, name, entry)
            else:
                rebuild_(model, name, entry, family)
            _ignore_placeholder(model, name)
            _skip_initialisation(model, name)
            continue
        if resized_sizes(entry) is not None or attention_sizes(entry) is not None:
            rebuild_nested_(model, name, entry, family)
            _skip_initialisation(model, name)
            continue
        dense = modules.get(name)
        ranks = ranks_of(entry)
        if ranks is None and type(dense) is nn.Embedding and dense is model.get_input_embeddings():
            columns, rows = dense.num_embeddings, dense.embedding_dim
        elif type(dense) is nn.Linear:
            columns = min(dense.in_features, entry.get("in_features", dense.in_features))
            rows = min(dense.out_features, entry.get("out_features", dense.out_features))
        else:
            raise UserError(
                f"the model's config factors {name}, not a linear layer of this architecture"
            )
        rank = entry["rank"] if ranks is None else max(ranks.values())
        if rank > min(columns, rows):
            raise UserError(
                f"the model's config gives {name} ({columns}x{rows}) rank {rank}, more than full rank"
            )
        device, dtype = dense.weight.device, dense.weight.dtype
        low_rank: nn.Module
        if ranks is not None and isinstance(dense, nn.Linear):
            low_rank = NestedLinear(columns, rows, ranks, entry["bias"], device, dtype)
        elif isinstance(dense, nn.Embedding):
            low_rank = LowRankEmbedding(columns, rows, rank, dense.padding_idx, device, dtype)
        else:
            low_rank = LowRankLinear(columns, rows, rank, entry["bias"], device, dtype)
        model.set_submodule(name, low_rank)
        _ignore_placeholder(model, name)
        _skip_initialisation(model, name)
    check_resized(model)


def _wanted_fraction(model: PreTrainedModel) -> Any:
    return getattr(model.config, "encoder_fraction", None)


def resolve_name(name: str, names: Container[str], prefix: str) -> str:
    """``name`` as it is, without or with the base model's prefix: the first that is one of ``names``, else ``name``.

    >>> resolve_name("bert.encoder", {"encoder"}, "bert"), resolve_name("encoder", {"bert.encoder"}, "bert")
    ('encoder', 'bert.encoder')
    """
    choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((choice for choice in choices if choice in names), name)


def _skip_initialisation(model: nn.Module, name: str) -> None:
    """Keep transformers from initialising the modules around a factored one: some families reach for its ``weight``.

    What has buffers that no file holds, such as positions, must be initialised and is left to do so.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = model.get_submodule(".".join(parts[:end]))
        if not isinstance(module, PreTrainedModel) and not module._non_persistent_buffers_set:
            # torch declares no attributes but tensors and modules.
            module._is_hf_initialized = True  # type: ignore[assignment]


def mark_low_rank(model: PreTrainedModel) -> None:
    """Record in ``model`` which of its modules are factored, so that its own ``save_pretrained`` writes all of it.

    Where there is nothing to record, an earlier record is removed.
    """
    config = LowRankConfig.of(model)
    if not config.modules and config.int8 is None:
        LowRankQuantizer(config).remove_quantization_config(model)
        return
    if config.fractions:
        model.config.encoder_fraction = config.fractions[0]
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config)
    for module in saved_modules(model).values():
        hooks = [getattr(hook, "hook", None) for hook in module._load_state_dict_pre_hooks.values()]
        if _is_placeable(module) and _drop_placeholder not in hooks:
            module.register_load_state_dict_pre_hook(_drop_placeholder)


def _is_placeable(module: nn.Module) -> bool:
    """Whether a dense model has a weight where ``module``, which has none, stands."""
    return isinstance(module, (*FACTORED, *QUANTISED, Constant, Removed))


def _ignore_placeholder(model: PreTrainedModel, name: str) -> None:
    """Let ``from_pretrained`` pass over a placeholder in the place of the module ``name``."""
    if _is_placeable(model.get_submodule(name)):
        rest = re.escape(name.removeprefix(f"{model.base_model_prefix}."))
        model._keys_to_ignore_on_load_unexpected.add(rf"(^|\.){rest}\.weight$")


def _drop_placeholder(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` take what a file holds."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.shape == PLACEHOLDER.shape:
        del state[f"{prefix}weight"]


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path
) -> None:
    """Write model and tokenizer to ``folder``, whole or not at all. Weights are safetensors.

    >>> import tempfile
    >>> from transformers import AutoModel, BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
    ...     intermediate_size=48))
    >>> folder = Path(tempfile.mkdtemp()) / "saved"
    >>> save(model, None, folder)
    >>> type(AutoModel.from_pretrained(folder)).__name__
    'BertModel'

    Args:
        model: dense, low-rank or fused. A fused one is saved as what it stands for, but an int8 one in int8: loading it
            gives the fused model again.
        tokenizer: None writes none.
        folder: made if it is not there; what it holds is replaced.

    Raises:
        UserError: the folder cannot be written.
    """
    config = LowRankConfig.of(model)
    if config.modules or config.int8 is not None:
        mark_low_rank(model)
    # It needs transformers whole, which may be half-imported when this module is.
    from ..kinds import kind_of

    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        kind_of(model).save(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
