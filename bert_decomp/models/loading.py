"""Loading classifiers and tokenizers strictly, and counting parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.demo import resolve_model
from ..errors import UserError
from ..kinds import EMBEDDING, SINGLE_LABEL, Kind, kind_of_config
from .architectures import encoder_layers, longest_input
from .folders import kind_of_folder, load_config, one_line
from .guards import check_tokenizer
from .weights import check_finite, check_size, skeleton


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: it is absent or unreadable, or another model's.
    """
    config = load_config(name_or_path)
    with one_line(f"the tokenizer of {name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name_or_path), trust_remote_code=False
        )
        check_tokenizer(tokenizer, config, name_or_path)
        tokenizer.model_max_length = min(
            tokenizer.model_max_length, longest_input(skeleton(config, SINGLE_LABEL)) or math.inf
        )
    return tokenizer


def load_model(
    name_or_path: str, kind: Kind | None = None, **config_changes: Any
) -> PreTrainedModel:
    """Load a model in float32, dense or low-rank, refusing checkpoints that do not fit.

    A bare encoder gets a new head (and pooler, if it brings none); apart from that every tensor of the model must be in
    the checkpoint, and the checkpoint may hold nothing of the encoder that the model lacks.

    Args:
        name_or_path: a folder, an embedded encoder's name, or a name in the local hub cache.
        kind: of task; None takes the checkpoint's own, a text classifier's for a bare encoder.
        config_changes: passed to the config (``num_labels``, ``id2label`` ...; ``encoder_fraction`` of a nested model).

    Raises:
        UserError: nothing loadable is there, or tensors are missing, foreign or of the wrong shape.
    """
    config = load_config(name_or_path, **config_changes)
    kind = kind or kind_of_config(config) or SINGLE_LABEL
    if kind is EMBEDDING:
        encoder = load_encoder(name_or_path, **config_changes)
        encoder.task_kind = kind.loaded(resolve_model(name_or_path), config)
        return encoder
    has_head = kind.has_head(config)
    with one_line(name_or_path):
        path = resolve_model(name_or_path)
        check_size(path, config, kind)
        model, found = kind.auto.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    prefix = f"{model.base_model_prefix}."
    # Of the skeleton, because an int8 model comes fused.
    layers = tuple(encoder_layers(skeleton(config, kind)))
    missing = set(found["missing_keys"])
    if not has_head:
        missing = {name for name in missing if name.startswith(prefix) and "pooler" not in name}
    foreign = {
        name
        for name in found["unexpected_keys"]
        if has_head
        or name.removeprefix(prefix).startswith(
            tuple(layer.removeprefix(prefix) for layer in layers)
        )
    }
    _refuse_misfits(name_or_path, config, missing, foreign, found["mismatched_keys"])
    check_finite(model, name_or_path)
    if (loaded := kind.loaded(path, config)) is not kind:
        model.task_kind = loaded
    return model


def load_encoder(name_or_path: str, **config_changes: Any) -> PreTrainedModel:
    """Load an encoder without a head in float32, dense or low-rank, refusing checkpoints that do not fit.

    A checkpoint's head is left out. A pooler that it lacks is removed: nothing may read one that was never trained.

    Args:
        config_changes: as ``load_model`` takes them.

    Raises:
        UserError: nothing loadable is there, or tensors are missing, foreign or of the wrong shape.
    """
    config = load_config(name_or_path, **config_changes)
    with one_line(name_or_path):
        path = resolve_model(name_or_path)
        check_size(path, config, EMBEDDING)
        model, found = AutoModel.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    missing = set(found["missing_keys"])
    if any("pooler" in name for name in missing):
        missing = {name for name in missing if "pooler" not in name}
        model.pooler = None
    layers = tuple(encoder_layers(skeleton(config, EMBEDDING)))
    foreign = {
        name
        for name in found["unexpected_keys"]
        if name.removeprefix(f"{model.base_model_prefix}.").startswith(layers)
    }
    _refuse_misfits(name_or_path, config, missing, foreign, found["mismatched_keys"])
    check_finite(model, name_or_path)
    return model


def load_as_saved(name_or_path: str) -> PreTrainedModel:
    """Load a model of any kind, or an encoder that was saved without a head, in float32.

    Raises:
        UserError: it is neither, or cannot be loaded.
    """
    kind = kind_of_folder(name_or_path)
    if kind is not None:
        return load_model(name_or_path, kind)
    for name in load_config(name_or_path).architectures or []:
        if "For" in name:
            raise UserError(
                f"{name_or_path} is a {name}, whose head would be lost; give a classifier, or an encoder without a head"
            )
    return load_encoder(name_or_path)


def _refuse_misfits(
    name_or_path: str, config: Any, missing: set[str], foreign: set[str], mismatched: Any
) -> None:
    """Raise UserError if tensors are missing, foreign or of the wrong shape."""
    foreign = {name for name in foreign if not name.endswith("position_ids")}
    for what, names in (
        ("lacks", missing),
        ("has foreign", foreign),
        ("has wrongly shaped", {str(entry[0]) for entry in mismatched}),
    ):
        if names:
            raise UserError(
                f"{name_or_path} {what} tensors: {', '.join(sorted(names)[:3])}"
                f"{' ...' if len(names) > 3 else ''} ({len(names)} in all); give the checkpoint of a "
                f"{config.model_type} classifier or encoder"
            )


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model, and of the encoder's layers alone (no embeddings, pooler or head)."""
    encoder = {
        id(p): p.numel() for layer in encoder_layers(model).values() for p in layer.parameters()
    }
    return {"whole": sum(p.numel() for p in model.parameters()), "encoder": sum(encoder.values())}
