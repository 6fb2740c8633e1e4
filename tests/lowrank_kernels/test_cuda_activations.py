"""The activations of the CUDA kernels, executed on every bfloat16 and float16, against float64."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from tests.csrc.emulator import launches, toolchain
from tests.csrc.emulator.exact import Bounded, activate
from tests.csrc.emulator.formats import FORMATS
from tests.csrc.emulator.machine import Cluster
from tests.csrc.emulator.memory import SEGMENT, GlobalMemory, Matrix

REASON = toolchain.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"PTX cannot be made: {REASON}"),
]
FILE = "activations_sm90a"
EVERY = np.arange(1 << 16, dtype=np.uint16)
# Where the fits end; results beyond are below this.
FITTED = {"gelu": 2.0**-60, "gelu_tanh": 2.0**-36}


def computed(name: str, dtype: str, folder) -> np.ndarray:
    """What the kernel gives for every element of the type."""
    x, y = (Matrix.blank(1, len(EVERY), len(EVERY)) for _ in range(2))
    x.values[0] = EVERY
    memory = GlobalMemory()
    memory.matrices |= {1 << SEGMENT: x, 2 << SEGMENT: y}
    kind = launches.ACTIVATIONS.index(name)
    block = struct.pack("<QQii", 1 << SEGMENT, 2 << SEGMENT, len(EVERY) // 2, kind)
    [kernel] = [k for k in toolchain.kernels_of(FILE, folder) if FORMATS[dtype].kernel in k.name]
    with np.errstate(all="ignore"):
        Cluster(kernel, block, {}, memory, 0, 1, 128, 1024, random.Random(0)).run()
    assert y.written_once()
    return decoded(y.values[0], dtype)


def decoded(bits: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return FORMATS[dtype].decode(bits).astype(np.float64)


def spacing(dtype: str, values: np.ndarray) -> np.ndarray:
    """What separates neighbours of the type there."""
    digits, least = (7, -126) if dtype == "bf16" else (10, -14)
    exponent = np.maximum(np.frexp(values)[1] - 1, least)
    return 2.0 ** (exponent - digits)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", launches.ACTIVATIONS)
def test_every_argument(ptx_folder, name, dtype):
    """Off by at most twice what rounding the exact result may change; relu and none are exact."""
    z = decoded(EVERY, dtype)
    result = computed(name, dtype, ptx_folder)
    exact = activate(name, Bounded(z)).value
    assert np.array_equal(np.isnan(result), np.isnan(z))
    infinite = np.isinf(z)
    assert np.array_equal(result[infinite], exact[infinite])
    finite = np.isfinite(z)
    result, exact = result[finite], exact[finite]
    bound = np.maximum(spacing(dtype, exact), FITTED[name]) if name in FITTED else 0.0
    assert (np.abs(result - exact) <= bound).all()
