"""Opening safetensors files of unknown origin: the header is judged before a library believes it.

safetensors itself refuses sizes that overflow, gaps, and tensors outside the file; what it lets pass, a name that
stands twice (the last one wins), is refused here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .json import check_file, parse_json

# Of safetensors itself is 100 MB; a header has some 100 bytes a tensor, and JSON takes some twenty times its text.
HEADER_LIMIT = 8 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds: ``metadata``, and dtype (safetensors' name) and shape by tensor."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, agreed with by safetensors.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    with open_tensors(path) as file:
        return Header(
            file.metadata() or {},
            {
                name: (part.get_dtype(), tuple(part.get_shape()))
                for name, part in ((name, file.get_slice(name)) for name in list(file.keys()))
            },
        )


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for torch, of a file whose header names nothing twice.

    Raises:
        UserError: it is not a whole safetensors file, or a tensor cannot be read.
    """
    path = check_file(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= min(HEADER_LIMIT, path.stat().st_size - 8):
                raise UserError(
                    f"{path} is not a whole safetensors file: its header cannot have {length} bytes; save "
                    "it again"
                )
            parse_json(stream.read(length).decode("utf-8"), f"the header of {path}")
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file: {error}; save it again"
        ) from error
