"""What a model's folder must be before transformers opens it: it may come from a stranger.

No code and no pickle is loaded from a folder, whatever it holds. What its files declare (sizes, ranks, names) is compared
with what they really hold before anything of that size is made.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..io.json import read_json
from ..io.safetensors import FLOATS, Header, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Attention forms that need no package beyond torch; a name with a slash would fetch a compiled kernel.
ATTENTION = (None, "eager", "sdpa")
# What a config may declare where no weights are there to compare it with.
MOST_LAYERS, MOST_LABELS = 1000, 65536
LARGEST_NUMBER = 2**31 - 1
# Numbers that a model may have beyond twice those in its file: a new head and pooler, and tables made from nothing.
NEW_NUMBERS = 2**22
SIZES = re.compile("^(num|n)_|(size|heads|layers|dim|embeddings)$")
TOKENIZER_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in plain values, with the key that it stands under. Iterative: nesting may be deep."""
    todo = [(name, value)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.items())
        elif isinstance(value, list):
            todo.extend((name, entry) for entry in value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def check_config(values: Any, path: str | Path, header: Header | None = None) -> None:
    """Raise UserError for a ``config.json`` that would run code, fetch something, or make something absurdly large.

    Args:
        header: of the folder's weights, if they are there.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration; write it anew")
    layers = MOST_LAYERS if header is None else min(MOST_LAYERS, len(header.tensors))
    labels = (
        MOST_LABELS
        if header is None
        else max((size for _, shape in header.tensors.values() for size in shape), default=1)
    )
    for name, number in _numbers(values):
        limit = (
            layers
            if "layers" in name or "groups" in name
            else labels
            if name == "num_labels"
            else LARGEST_NUMBER
        )
        finite = isinstance(number, int) or math.isfinite(number)
        # A fraction such as an initial range has no size; a count has one, however it is written.
        if (
            not finite
            or abs(number) > limit
            and not (isinstance(number, float) and limit == LARGEST_NUMBER)
        ):
            raise UserError(f"{path} has {number!r:.40} as {name}, which cannot be; write it anew")
        if number < 0 and SIZES.search(name):
            raise UserError(f"{path} has {number} as {name}; a size is not negative: write it anew")
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if values.get(name) not in ATTENTION:
            raise UserError(
                f"{path} asks for the {name} {values[name]!r}, which may be code from elsewhere; remove that line"
            )
    if "transformers_weights" in values:
        raise UserError(
            f"{path} names another weight file; remove transformers_weights and call the weights {WEIGHTS}"
        )
    quantization = values.get("quantization_config")
    if quantization is not None and not (
        isinstance(quantization, dict)
        and quantization.get("quant_method") == "low_rank"
        and set(quantization) <= {"quant_method", "version", "modules"}
    ):
        raise UserError(
            f"{path} has a quantization_config that is not of low_rank factors; give a model in floating point"
        )
    modules = quantization.get("modules") if quantization else None
    if header is not None and isinstance(modules, dict) and len(modules) > len(header.tensors):
        raise UserError(
            f"{path} factors {len(modules)} modules, but the weights hold {len(header.tensors)} tensors"
        )
    names = values.get("id2label")
    if names is not None and not (
        isinstance(names, dict)
        and len(names) <= labels
        and all(map(_is_text, names.values()))
        and set(names) == {str(index) for index in range(len(names))}
    ):
        raise UserError(
            f"{path} has an id2label that does not name the labels 0, 1, ... by text; write it anew"
        )
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(_is_text(name) for name in architectures)
    ):
        raise UserError(f"{path} has architectures that are not a list of names; write it anew")


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be written in UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def check_entries(folder: Path) -> None:
    """Raise UserError if the folder holds what cannot be read (a pipe, a device), or an adapter for another model."""
    for path in folder.iterdir():
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; remove it") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is neither file nor folder; remove it")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter for another model; merge it into its model and save that"
        )


def read_weights(folder: Path) -> Header | None:
    """What the folder's weights hold; None if there are none.

    Raises:
        UserError: they are damaged, not of floating point, or in a file outside of the folder.
    """
    if (folder / WEIGHTS).exists():
        files = {folder / WEIGHTS}
    elif (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if (
            not isinstance(names, dict)
            or not names
            or not all(
                isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
                for name in names.values()
            )
        ):
            raise UserError(
                f"{folder / INDEX} does not map tensors to safetensors files of the same folder; write it anew"
            )
        files = {folder / name for name in names.values()}
    else:
        return None
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(files):
        tensors.update(read_header(file).tensors)
    for name, (dtype, _) in tensors.items():
        if dtype not in FLOATS and not name.endswith("position_ids"):
            raise UserError(
                f"{folder} has the tensor {name} in {dtype}; weights are in one of {', '.join(FLOATS)}"
            )
    return Header({}, tensors)


def check_folder(name_or_path: str | Path) -> None:
    """Raise UserError for a model's folder that must not be opened; a name that is no folder is left to the hub's cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        check_entries(folder)
        check_config(
            read_json(folder / "config.json"), folder / "config.json", read_weights(folder)
        )


def skeleton(config: Any) -> PreTrainedModel:
    """The classifier that a config describes, factored modules too, without storage."""
    # It registers itself with transformers, which this module stays apart from.
    from .saving import LowRankConfig, swap_

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            swap_(model, LowRankConfig.from_dict(config.quantization_config))
    return model


def check_size(name_or_path: str | Path, **config_changes: Any) -> None:
    """Raise UserError if a folder's config describes other shapes than its weights have, or far more than they fill."""
    folder = Path(name_or_path)
    header = read_weights(folder) if folder.is_dir() else None
    if header is None:
        if folder.is_dir():
            raise UserError(
                f"cannot load {folder}: it has no {WEIGHTS} (pickled weights such as pytorch_model.bin are never "
                "opened); save the model as safetensors"
            )
        return
    model = skeleton(AutoConfig.from_pretrained(folder, trust_remote_code=False, **config_changes))
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if name in header.tensors and header.tensors[name][1] != tuple(tensor.shape)
    ]
    if wrong:
        raise UserError(
            f"{folder} has wrongly shaped tensors: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} "
            f"({len(wrong)} in all); its config.json is another model's"
        )
    declared = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(shape) for _, shape in header.tensors.values())
    if declared > 2 * held + NEW_NUMBERS:
        raise UserError(
            f"{folder} describes a model of {declared} numbers but holds {held}; its config.json is "
            "another model's"
        )


def check_finite(model: nn.Module, name_or_path: str) -> None:
    """Raise UserError if a weight is not a finite number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{name_or_path} has values in {name} that are not finite numbers; save the model again, or "
                "take an earlier checkpoint"
            )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, name_or_path: str) -> None:
    """Raise UserError for a tokenizer that makes what the model cannot take."""

    def wrong(what: str) -> UserError:
        return UserError(
            f"the tokenizer in {name_or_path} {what}; put the model's own tokenizer there"
        )

    embeddings, types = config.vocab_size, getattr(config, "type_vocab_size", None)
    if max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1)) > embeddings:
        raise wrong(f"has {len(tokenizer)} entries but the model embeds {embeddings}")
    if tokenizer.pad_token is None:
        raise wrong("has no padding token")
    made = tokenizer("a", "b")
    if not {"input_ids", "attention_mask"} <= set(made) <= TOKENIZER_OUTPUTS:
        raise wrong(f"makes {', '.join(made)}, not input_ids and attention_mask")
    if (
        not all(0 <= number < embeddings for number in made["input_ids"])
        or types is not None
        and not all(0 <= number < max(types, 1) for number in made.get("token_type_ids", []))
    ):
        raise wrong("makes numbers that the model does not embed")
    if (
        not isinstance(tokenizer.model_max_length, (int, float))
        or not tokenizer.model_max_length >= 3
    ):
        raise wrong(f"takes {tokenizer.model_max_length} tokens at most")
