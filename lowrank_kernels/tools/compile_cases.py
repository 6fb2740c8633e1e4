"""What ``compile_check`` compiles: tiles of every operator, in the variants that are launched, for GPUs by number."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..problem import RANK_CLASSES, Problem
from ..triton_backend.support import HEAD_LIMIT, why_not_for
from ..triton_backend.tiles import FEW_QUERIES, OPERATORS, Family, Tile, attention_space, space

# Compute capability -> its tiles. 86 and 89 get the same code from Triton up to the instruction encoding.
ARCHS = {
    80: Family.AMPERE,
    86: Family.COMPACT,
    89: Family.COMPACT,
    90: Family.HOPPER,
    100: Family.BLACKWELL,
    120: Family.COMPACT_BLACKWELL,
}
# sm_80 and sm_90 are what a part of the space is checked for.
MAIN_ARCHS = (80, 90)
# What differs between the launches of one tile: which optional pointers are there, which way the factors lie.
VARIANTS = {
    "linear": ("forward", "training", "backward"),
    "qkv": ("forward", "training"),
    "ffn": ("forward", "training", "split", "reduce"),
    "linear_norm": ("forward", "training"),
    "attention": ("forward",),
}
# Sizes of heads that attention is checked for: what a product is padded to.
HEAD_SIZES = (16, 32, 64, HEAD_LIMIT)
# How a dtype is called here -> Triton's name of its elements, torch's dtype, precision of products. The first is the
# one that a part of the space is checked in.
DTYPES = {
    "bf16": ("bf16", torch.bfloat16, "ieee"),
    "fp16": ("fp16", torch.float16, "ieee"),
    "fp32": ("fp32", torch.float32, "ieee"),
    "tf32": ("fp32", torch.float32, "tf32"),
}


@dataclass(frozen=True)
class Case:
    """One compilation: an operator's tile at a rank and dtype (of ``DTYPES``), in one variant, for one GPU.

    In the place of a rank, attention has the size of its heads.
    """

    operator: str
    variant: str
    rank: int
    dtype: str
    tile: Tile
    arch: int

    @property
    def bits16(self) -> bool:
        return DTYPES[self.dtype][1].itemsize == 2


def cases(everything: bool, archs: Iterable[int] | None = None) -> list[Case]:
    """The cases of the whole tuning space, or a representative part of it, for some GPUs.

    The part is the default tile of every operator and variant at rank 256, and at the two-piece rank 96 the first
    variant's, in bfloat16; and that of attention by heads of 64.

    Args:
        everything: every tile, rank class and dtype.
        archs: keys of ``ARCHS``; left out, all of them, or ``MAIN_ARCHS`` for a part.
    """
    archs = tuple(archs or (ARCHS if everything else MAIN_ARCHS))
    result = []
    for operator, rank, dtype in itertools.product(
        OPERATORS, RANK_CLASSES if everything else (96, 256), DTYPES if everything else ("bf16",)
    ):
        kind = DTYPES[dtype][1]
        if why_not_for(Problem(operator, 1, 1, 1, rank, kind), torch.device("cpu")):
            continue
        for variant, arch in itertools.product(VARIANTS[operator], archs):
            main = variant == VARIANTS[operator][0]
            if not main and (kind == torch.float32 or (not everything and rank != 256)):
                continue
            tiles = space(operator, rank, kind.itemsize, ARCHS[arch])
            result += [
                Case(operator, variant, rank, dtype, tile, arch)
                for tile in (tiles if main and everything else tiles[:1])
            ]
    for size, dtype, arch in itertools.product(
        HEAD_SIZES if everything else (64,), ("bf16", "fp16") if everything else ("bf16",), archs
    ):
        found = [attention_space(queries, size) for queries in (FEW_QUERIES, 32, 128)]
        chosen = list(dict.fromkeys(itertools.chain(*found))) if everything else found[-1][:1]
        result += [Case("attention", "forward", size, dtype, tile, arch) for tile in chosen]
    return result
