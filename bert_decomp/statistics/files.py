"""Safetensors files that describe themselves: tensors, a description in JSON, and a checksum of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..io.atomic import atomic_file
from ..io.json import parse_json
from ..io.safetensors import open_tensors


def write_tensors(path: str | Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One safetensors file with a description and a checksum, whole or not at all."""
    with atomic_file(path) as temporary:
        save_file(
            tensors,
            temporary,
            metadata={
                "bert_decomp": json.dumps(about),
                "checksum": checksum(about, sorted(tensors.items())),
            },
        )


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``write_tensors`` wrote.

    Raises:
        UserError, ValueError: it did not, or the file is damaged.
    """
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    if "bert_decomp" not in metadata:
        raise ValueError("it does not describe itself")
    about = parse_json(metadata["bert_decomp"], f"the description in {path}")
    digest = checksum(about, sorted(tensors.items()))
    # Files from before there were checksums have none.
    if metadata.get("checksum", digest) != digest:
        raise ValueError("its checksum differs: it is damaged")
    return about, tensors


def checksum(about: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of a description and of named tensors in the order of their names."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
