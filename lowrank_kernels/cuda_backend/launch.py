"""What the launchers share: matrices as the kernels take them, and errors as Python raises them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment import pad_rank
from . import build

DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
NOTHING = (0, 0, 0, 0)


def aligned_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous and start on 16 bytes: as given if it already is one, else a copy."""
    stride = matrix.stride(0)
    if (
        matrix.stride(1) == 1
        and stride % 8 == 0
        and stride >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    ):
        return matrix
    # contiguous() would return an odd single row as it is.
    return torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A factor pair as the kernels take it: rank padded to a multiple of 16, rows contiguous.

    The backward pass hands in transposed factors, which are copied: they are small beside the activations.
    """
    down, up = pad_rank(down, up)
    return aligned_rows(down), aligned_rows(up)


def vector(bias: Tensor | None) -> Tensor | None:
    """A bias that is contiguous and starts on 4 bytes."""
    if bias is None or (bias.stride(0) == 1 and bias.data_ptr() % 4 == 0):
        return bias
    return torch.empty(bias.shape, dtype=bias.dtype, device=bias.device).copy_(bias)


def descriptor(matrix: Tensor | None) -> tuple[int, int, int, int]:
    """Address, rows, columns and stride, as the module takes them."""
    return NOTHING if matrix is None else (matrix.data_ptr(), *matrix.shape, matrix.stride(0))


def address(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()


def stream_of(x: Tensor) -> tuple[int, int]:
    """The device's number and its current stream, which a launch goes to."""
    index = x.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def run(name: str, *arguments: object) -> None:
    """Call a function of the compiled module.

    Raises:
        ValueError: an argument does not fit the kernels.
        RuntimeError: CUDA refused the launch.
    """
    code, message = getattr(build.module(), name)(*arguments)
    if code:
        raise (ValueError if code == 1 else RuntimeError)(f"{name}: {message}")
