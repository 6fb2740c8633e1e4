"""A folder's weights before they are loaded: names, shapes and sizes, from the header alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..io.json import read_json
from ..io.safetensors import FLOATS, Header, read_header
from ..kinds import Kind

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What DistributedDataParallel and torch.compile put before the names of a model inside of them.
WRAPPERS = ("module.", "_orig_mod.")
PYTHON = "python -c "
# Numbers that a model may have beyond twice those in its file: a new head and pooler, and tables made from nothing.
NEW_NUMBERS = 2**22


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
                f"{folder / INDEX} does not map tensors to safetensors files of the same folder; save it again"
            )
        files = {folder / name for name in names.values()}
    else:
        return None
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(files):
        tensors.update(read_header(file).tensors)
    for name, (dtype, _) in tensors.items():
        if dtype not in (*FLOATS, "I8") and not name.endswith("position_ids"):
            raise UserError(
                f"{folder} has the tensor {name} in {dtype}; weights are in one of {', '.join(FLOATS)}"
            )
        for wrapper in WRAPPERS:
            if name.startswith(wrapper):
                raise UserError(_rename(folder, sorted(files), wrapper))
    return Header({}, tensors)


def _rename(folder: Path, files: list[Path], wrapper: str) -> str:
    message = f"the tensors in {folder} are named {wrapper}..., as inside a wrapper; "
    if len(files) > 1:
        return message + f"save the model inside, wrapped.{wrapper.rstrip('.')}, again"
    return message + (
        f'rename them: {PYTHON}"from safetensors.torch import load, save_file; f = {str(files[0])!r}; '
        f"save_file({{k.removeprefix('{wrapper}'): v for k, v in load(open(f, 'rb').read()).items()}}, "
        "f, {'format': 'pt'})\""
    )


def _convert(folder: Path, pickled: Path) -> str:
    return (
        f"{folder} has no {WEIGHTS}, and pickled weights such as {pickled.name} are never opened; "
        f'convert them: {PYTHON}"import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone().contiguous() for k, v in torch.load({str(pickled)!r}, weights_only=True).items()}}, "
        f"{str(folder / WEIGHTS)!r}, {{'format': 'pt'}})\""
    )


def skeleton(config: Any, kind: Kind) -> PreTrainedModel:
    """The model of a kind that a config describes, factored modules too, without storage."""
    # It registers itself with transformers, which this module stays apart from.
    from .format import LowRankConfig
    from .saving import swap_

    config = copy.deepcopy(config)
    with torch.device("meta"):
        if issubclass(kind.auto, PreTrainedModel):
            model = kind.auto._from_config(config)
        else:
            model = kind.auto.from_config(config, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            swap_(model, LowRankConfig.from_dict(config.quantization_config))
    return model


def check_size(name_or_path: str | Path, config: Any, kind: Kind) -> None:
    """Raise UserError if a folder's config describes other shapes than its weights have, or far more than they fill."""
    from .format import FACTORED
    from .int8 import QUANTISED
    from .saving import PLACEHOLDER, resolve_name

    folder = Path(name_or_path)
    header = read_weights(folder) if folder.is_dir() else None
    if header is None:
        if folder.is_dir():
            if (folder / "pytorch_model.bin").exists():
                raise UserError(_convert(folder, folder / "pytorch_model.bin"))
            raise UserError(
                f"cannot load {folder}: it has no {WEIGHTS} (pickled weights such as pytorch_model.bin are never "
                "opened); save the model as safetensors"
            )
        return
    model = skeleton(config, kind)
    # A headless folder lacks the base model's prefix.
    saved = {
        name: resolve_name(name, header.tensors, model.base_model_prefix)
        for name in model.state_dict()
    }
    state = model.state_dict()
    quantised = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, QUANTISED)
    )
    lost = [
        name for name in state if name.startswith(quantised) and saved[name] not in header.tensors
    ]
    if lost:
        raise UserError(f"{folder} lacks tensors: {_some(lost)}; save the model in int8 again")
    bytes_ = {name for name, (dtype, _) in header.tensors.items() if dtype == "I8"}
    odd = bytes_ ^ {saved[name] for name, tensor in state.items() if tensor.dtype == torch.int8}
    if odd:
        raise UserError(
            f"{folder} has weights in int8 where its config.json has none, or the other way round: "
            f"{_some(sorted(odd))}; save the model again"
        )
    wrong = [
        name
        for name, tensor in state.items()
        if saved[name] in header.tensors and header.tensors[saved[name]][1] != tuple(tensor.shape)
    ]
    wrong += [
        dense
        for name, module in model.named_modules()
        if isinstance(module, (*FACTORED, *QUANTISED))
        and (dense := resolve_name(f"{name}.weight", header.tensors, model.base_model_prefix))
        in header.tensors
        and header.tensors[dense][1] != tuple(PLACEHOLDER.shape)
    ]
    if wrong:
        raise UserError(
            f"{folder} has wrongly shaped tensors: {_some(wrong)}; its config.json is another model's"
        )
    declared = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(shape) for _, shape in header.tensors.values())
    if declared > 2 * held + NEW_NUMBERS:
        raise UserError(
            f"{folder} describes a model of {declared} numbers but holds {held}; its config.json is "
            "another model's"
        )


def _some(names: list[str]) -> str:
    """The first of some names, and how many there are."""
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"


def check_finite(model: nn.Module, name_or_path: str) -> None:
    """Raise UserError if a weight is not a finite number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{name_or_path} has values in {name} that are not finite numbers; save the model again, or "
                "take an earlier checkpoint"
            )
