"""What an untrusted model's folder must be before transformers opens it: ``check_folder`` is the one call.

No code and no pickle is loaded from a folder, whatever it holds. What its files declare (sizes, ranks, names) is
compared with what they really hold before anything of that size is made.
"""

from __future__ import annotations

import logging
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..io.json import read_json
from ..io.safetensors import Header
from .weights import PYTHON, WEIGHTS, read_weights

logger = logging.getLogger("bert_decomp")

# Attention forms that need no package beyond torch.
ATTENTION = (None, "eager", "sdpa")
# What a config may declare where no weights are there to compare it with.
MOST_LAYERS, MOST_LABELS = 1000, 65536
LARGEST_NUMBER = 2**31 - 1
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
        raise UserError(f"{path} holds no configuration; save it again")
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
        if not finite or (
            abs(number) > limit and not (isinstance(number, float) and limit == LARGEST_NUMBER)
        ):
            raise UserError(f"{path} has {number!r:.40} as {name}, which cannot be; save it again")
        if number < 0 and SIZES.search(name):
            raise UserError(f"{path} has {number} as {name}; a size is not negative: save it again")
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        # A name with a slash, which may also stand in a table, would fetch a compiled kernel.
        if values.get(name) is not None and (
            not isinstance(values[name], str) or "/" in values[name]
        ):
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
        and set(quantization) <= {"quant_method", "version", "modules", "int8"}
    ):
        raise UserError(
            f"{path} has a quantization_config that is not this package's; give a model in floating point"
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
            f"{path} has an id2label that does not name the labels 0, 1, ... by text; save it again"
        )
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(_is_text(name) for name in architectures)
    ):
        raise UserError(f"{path} has architectures that are not a list of names; save it again")


def ignore_attention(config: Any, name_or_path: str) -> None:
    """Leave the choice of attention to transformers where a config names one that needs more than torch."""
    if config._attn_implementation not in ATTENTION:
        logger.warning(
            "%s asks for the attention %s; it is ignored", name_or_path, config._attn_implementation
        )
        config._attn_implementation = None


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
            f'{folder} holds an adapter, not a model; merge the two: {PYTHON}"from peft import '
            f"AutoPeftModelForSequenceClassification as A; A.from_pretrained({str(folder)!r})"
            f'.merge_and_unload().save_pretrained({str(folder) + "-merged"!r})"'
        )


def check_folder(name_or_path: str | Path) -> None:
    """Raise UserError for a model's folder that must not be opened; any other name is left to the hub's cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        check_entries(folder)
        check_config(
            read_json(folder / "config.json"), folder / "config.json", read_weights(folder)
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
    # What transformers makes of a folder without a tokenizer's files: each word would be the unknown one.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise wrong("knows no words")
    if tokenizer.pad_token is None:
        raise wrong("has no padding token")
    made = tokenizer("a", "b")
    if not {"input_ids", "attention_mask"} <= set(made) <= TOKENIZER_OUTPUTS:
        raise wrong(f"makes {', '.join(made)}, not input_ids and attention_mask")
    types_fit = types is None or all(
        0 <= number < max(types, 1) for number in made.get("token_type_ids", [])
    )
    if not all(0 <= number < embeddings for number in made["input_ids"]) or not types_fit:
        raise wrong("makes numbers that the model does not embed")
    if (
        not isinstance(tokenizer.model_max_length, (int, float))
        or not tokenizer.model_max_length >= 3
    ):
        raise wrong(f"takes {tokenizer.model_max_length} tokens at most")
