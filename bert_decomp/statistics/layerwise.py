"""Collection of a few encoder layers at a time, for encoders whose statistics are larger than the memory.

Each pass over the calibration set sums for some layers alone and leaves them in a file; the files are then joined into
one, tensor by tensor. What is collected is the same to the bit, the time is that of as many passes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..io.atomic import atomic_file, remove
from ..io.json import parse_json
from ..io.memory import machine_memory
from ..io.safetensors import open_tensors
from ..models.architectures import encoder_layers
from .collect import collect_statistics, fingerprint
from .files import checksum, read_tensors

# Bytes of sums that may be held at once, and the share of the machine's memory where that is more. Every pass that is
# saved is a third of the time or more, and what is free at a moment would not do: parts of a collection that was
# interrupted are taken up again if they are of the same layers.
MEMORY, SHARE = 2**30, 8


def fitting_layers(
    model: nn.Module,
    modules: dict[str, nn.Linear],
    needs: Iterable[str],
    limit: int | None = None,
) -> int:
    """How many encoder layers' statistics fit into ``limit`` bytes, at least one. Layers that read one tensor share its
    moments, which is not counted on. Without a limit it is an eighth of the memory, and 1 GiB at least."""
    if limit is None:
        limit = max(MEMORY, (machine_memory() or 0) // SHARE)
    sizes = []
    for prefix in encoder_layers(model):
        inside = [module for name, module in modules.items() if name.startswith(f"{prefix}.")]
        of = {
            "inputs": sum(module.in_features**2 for module in inside),
            "gradients": sum(module.in_features**2 + module.out_features**2 for module in inside),
            "fisher": sum(module.in_features for module in inside),
        }
        sizes.append(8 * sum(of[need] for need in needs))
    return max(1, limit // max(sizes, default=1)) if any(sizes) else len(sizes) or 1


def layer_groups(
    model: nn.Module, modules: Mapping[str, nn.Module], layers_at_once: int
) -> list[dict[str, nn.Module]]:
    """``modules`` by runs of ``layers_at_once`` encoder layers; those of no layer come last, together."""
    layers = [f"{layer}." for layer in encoder_layers(model)]
    runs = [
        tuple(layers[start : start + layers_at_once])
        for start in range(0, len(layers), layers_at_once)
    ]
    groups = [
        {name: module for name, module in modules.items() if name.startswith(run)} for run in runs
    ]
    groups.append(
        {name: module for name, module in modules.items() if not name.startswith(tuple(layers))}
    )
    return [group for group in groups if group]


def collect_to_file(
    path: str | Path,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    *,
    needs: Iterable[str] = ("inputs",),
    layers_at_once: int | None = None,
    progress: bool = True,
) -> None:
    """Collect statistics into a file that ``Statistics.load`` reads, resumably.

    Args:
        layers_at_once: encoder layers whose statistics are held in memory at once, with a pass over ``batches`` for
            each such run of layers; None takes all in one pass. Other arguments are those of ``collect_statistics``.

    Raises:
        UserError: as ``collect_statistics``, or ``layers_at_once`` is below 1.
    """
    path, needs = Path(path), tuple(sorted(set(needs)))
    sums = path.with_suffix(".partial")
    if layers_at_once is None:
        collect_statistics(
            model, batches, modules, needs=needs, progress=progress, checkpoint=sums
        ).save(path)
        return
    if layers_at_once < 1:
        raise UserError(f"{layers_at_once} layers at once cannot be collected; the smallest is 1")
    groups = layer_groups(model, modules, layers_at_once)
    if len(groups) == 1:
        collect_to_file(path, model, batches, modules, needs=needs, progress=progress)
        return
    digest, parts = fingerprint(model, batches), []
    for index, group in enumerate(tqdm(groups, desc="layers", disable=not progress, leave=False)):
        part = path.with_suffix(f".part{index}")
        if not _is_of(part, digest, group, needs):
            collect_statistics(
                model, batches, group, needs=needs, progress=progress, checkpoint=sums
            ).save(part)
        parts.append(part)
    _join(path, parts)
    for part in parts:
        remove(part)


def _is_of(part: Path, digest: str, group: Iterable[str], needs: Iterable[str]) -> bool:
    """Whether an interrupted collection left there, whole, what is to be collected."""
    if not part.is_file():
        return False
    try:
        about, tensors = read_tensors(part)
        return (
            about["fingerprint"] == digest
            and set(about["source"]) == set(group)
            and {name.split(":")[0] for name in tensors} == set(needs)
        )
    except (UserError, TypeError, KeyError, ValueError):
        return False


def _join(path: Path, parts: list[Path]) -> None:
    """One file of the same statistics. safetensors itself writes only what is in memory as a whole, so its format (the
    header's length, the header in JSON, then the tensors) is written here, one tensor at a time."""
    about: dict[str, Any] = {}
    where: dict[str, tuple[Path, list[int]]] = {}
    for part in parts:
        with open_tensors(part) as file:
            for key, value in parse_json(
                file.metadata()["bert_decomp"], f"the description in {part}"
            ).items():
                about[key] = {**about.get(key, {}), **value} if isinstance(value, dict) else value
            names = list(file.keys())
            where.update({name: (part, file.get_slice(name).get_shape()) for name in names})
    absent = "0" * len(checksum(about, ()))
    header: dict[str, Any] = {
        "__metadata__": {"bert_decomp": json.dumps(about), "checksum": absent}
    }
    end = 0
    for name, (_, shape) in sorted(where.items()):
        start, end = end, end + 8 * math.prod(shape)
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:

        def copied() -> Iterator[tuple[str, Tensor]]:
            for name, (part, _) in sorted(where.items()):
                with open_tensors(part) as file:
                    tensor = file.get_tensor(name)
                stream.write(tensor.numpy().data)
                yield name, tensor

        stream.write(struct.pack("<Q", len(text)) + text)
        found = checksum(about, copied())
        stream.seek(8 + text.index(absent.encode()))
        stream.write(found.encode())
