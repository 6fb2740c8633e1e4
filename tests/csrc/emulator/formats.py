"""The two 16-bit types, as bits and as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """``encode`` rounds to nearest, ties to even; ``decode`` is exact, into float32."""

    name: str
    number: int  # lowrank.h's Dtype
    kernel: str  # what the names of its kernels contain

    def encode(self, values: np.ndarray) -> np.ndarray:
        if self.name == "f16":
            return values.astype(np.float16).view(np.uint16)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))

    def decode(self, bits: np.ndarray) -> np.ndarray:
        if self.name == "f16":
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def round(self, values: np.ndarray) -> np.ndarray:
        """The nearest numbers of this type, in float64."""
        return self.decode(self.encode(values)).astype(np.float64)


BF16 = Format("bf16", 0, "bfloat16_t")
F16 = Format("f16", 1, "half_t")
FORMATS = {format_.name: format_ for format_ in (BF16, F16)}
