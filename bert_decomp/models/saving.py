"""Saving and loading low-rank models through transformers' registered quantizer interface.

After ``import bert_decomp`` a folder written by ``save`` (or by the model's own ``save_pretrained``) loads with
``from_pretrained`` of every auto class, with or without a head: the folder's ``config.json`` holds the rank of every
factored module, the registered quantizer swaps those modules before the weights are read, and safetensors holds the
factors. No code is loaded from the folder.

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
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..io.atomic import atomic_folder
from .architectures import FAMILIES
from .embedding import LowRankEmbedding
from .replacement import Replacement
from .resized import (
    RESIZED,
    Constant,
    Removed,
    check_resized,
    describe,
    is_description,
    rebuild_,
)

# Version 1 had no placeholder.
FORMAT_VERSION = 2
FACTORED = (LowRankLinear, LowRankEmbedding)
PLACEHOLDER = torch.zeros(0)


@register_quantization_config("low_rank")
class LowRankConfig(QuantizationConfigMixin):
    """What must be known to rebuild the factored modules before their weights are read.

    >>> LowRankConfig({"encoder.layer.0.output.dense": {"rank": 8, "bias": True}}).to_dict()["quant_method"]
    'low_rank'

    Args:
        modules: for each factored module's qualified name ``{"rank": int, "bias": bool}``. The bias is part of the
            plan because a centred method adds one to a layer that had none. A factored word embedding always has one.
            A resized module has its sizes (see ``resized``), and a factored one among them ``in_features`` and
            ``out_features`` besides.
        version: of the format that the folder has; what is written has ``FORMAT_VERSION``.

    Raises:
        UserError: the format is of a later version, or an entry is malformed.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        **ignored: Any,
    ):
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UserError(
                f"low-rank format version {version!r} is not one of 1 to {FORMAT_VERSION}; "
                "load the model with the bert_decomp that wrote it"
            )
        self.quant_method = "low_rank"
        self.version = FORMAT_VERSION
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
        """Describe the factored and resized modules that ``model`` has now; a fused model's are those it stands for."""
        modules = _unfused_modules(model)
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


def _unfused_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` with what inference forms stand for in their place."""
    modules: dict[str, nn.Module] = {}
    replaced: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(replaced):
            continue
        if isinstance(module, Replacement):
            replaced += (f"{name}.",)
            modules.update(module.source.named_modules(prefix=name))
        else:
            modules[name] = module
    return modules


@register_quantizer("low_rank")
class LowRankQuantizer(HfQuantizer):
    """Swaps the modules named in a ``LowRankConfig`` before the weights are loaded. The result is trainable."""

    requires_calibration = True
    is_trainable = True
    is_compileable = True

    def is_serializable(self, **ignored: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> None:
        swap_(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> None:
        # The factors are plain floating-point numbers: .half(), .float() and training work as on any model, all of
        # which transformers refuses to models that it takes for quantized.
        model.is_quantized = False
        mark_low_rank(model)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes, before it writes the config: the state dict, and the placeholder."""
        mark_low_rank(model)
        if not model.config.quantization_config.modules:
            self.remove_quantization_config(model)
            return None, {}
        # Where there is none, another weight has a shape that fits no dense model.
        name = next(
            (name for name, module in _unfused_modules(model).items() if _is_placeable(module)),
            None,
        )
        placeholder = {} if name is None else {f"{name}.weight": PLACEHOLDER.to(model.dtype)}
        return {**model.state_dict(), **placeholder}, {}


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
        if is_description(entry):
            rebuild_(model, name, entry, family)
            _ignore_placeholder(model, name)
            _skip_initialisation(model, name)
            continue
        dense = modules.get(name)
        if type(dense) is nn.Embedding and dense is model.get_input_embeddings():
            columns, rows = dense.num_embeddings, dense.embedding_dim
        elif type(dense) is nn.Linear:
            columns = min(dense.in_features, entry.get("in_features", dense.in_features))
            rows = min(dense.out_features, entry.get("out_features", dense.out_features))
        else:
            raise UserError(
                f"the model's config factors {name}, not a linear layer of this architecture"
            )
        if entry["rank"] > min(columns, rows):
            raise UserError(
                f"the model's config gives {name} ({columns}x{rows}) rank {entry['rank']}, more than full rank"
            )
        device, dtype, rank = dense.weight.device, dense.weight.dtype, entry["rank"]
        low_rank: nn.Module
        if isinstance(dense, nn.Embedding):
            low_rank = LowRankEmbedding(columns, rows, rank, dense.padding_idx, device, dtype)
        else:
            low_rank = LowRankLinear(columns, rows, rank, entry["bias"], device, dtype)
        model.set_submodule(name, low_rank)
        _ignore_placeholder(model, name)
        _skip_initialisation(model, name)
    check_resized(model)


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
    """Record in ``model`` which of its modules are factored, so that its own ``save_pretrained`` writes all of it."""
    config = LowRankConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config)
    for module in _unfused_modules(model).values():
        hooks = [getattr(hook, "hook", None) for hook in module._load_state_dict_pre_hooks.values()]
        if _is_placeable(module) and _drop_placeholder not in hooks:
            module.register_load_state_dict_pre_hook(_drop_placeholder)


def _is_placeable(module: nn.Module) -> bool:
    """Whether a dense model has a weight where ``module``, which has none, stands."""
    return isinstance(module, (*FACTORED, Constant, Removed))


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
        model: dense, low-rank or fused; a fused one is saved as what it stands for.
        tokenizer: None writes none.
        folder: made if it is not there; what it holds is replaced.

    Raises:
        UserError: the folder cannot be written.
    """
    if LowRankConfig.of(model).modules:
        mark_low_rank(model)
    # It needs transformers whole, which may be half-imported when this module is.
    from ..kinds import kind_of

    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        kind_of(model).save(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
