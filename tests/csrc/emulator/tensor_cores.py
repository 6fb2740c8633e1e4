"""The products: ``wgmma`` of a warpgroup, ``mma`` of a warp. Sums are in float64, rounded to float32 at the end of
each."""

from __future__ import annotations

import re

import numpy as np

from .formats import FORMATS, Format
from .machine import ALL, LANES, Warpgroup, instruction, require
from .memory import swizzle
from .ptx import Instruction

THREADS = np.arange(LANES)
WARP, LANE = THREADS // 32, THREADS % 32
DEPTH = 16
SWIZZLES = {1: 128, 2: 64}  # by the two highest bits of a descriptor


def _tile(group: Warpgroup, descriptor: np.ndarray, rows: int, format_: Format) -> np.ndarray:
    """``rows`` x 16 elements of a K-major operand in shared memory.

    PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation using wgmma.mma_async", "Matrix
    descriptor format": the start address (bits 0 to 13) and the stride between groups of 8 rows (bits 32 to 45) are
    in units of 16 bytes, bits 49 to 51 are the base offset, bits 62 and 63 the swizzle. In a swizzled K-major layout
    ("Shared memory matrix layout") a row has as many bytes as the swizzle, and the leading dimension's offset is not
    used.
    """
    require((descriptor == descriptor[0]).all(), "threads give different descriptors")
    bits = int(descriptor[0])
    start, stride = (bits & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
    require(bits >> 49 & 7 == 0 and bits >> 62 in SWIZZLES, "a layout that is not modelled")
    pitch = SWIZZLES[bits >> 62]
    row, column = np.arange(rows)[:, None], np.arange(DEPTH)
    plain = start + row // 8 * stride + row % 8 * pitch + column * 2
    return format_.decode(group.cta.shared.elements(swizzle(plain, pitch)))


def _registers_of_a(group: Warpgroup, names: tuple[str, ...], format_: Format) -> np.ndarray:
    """64 x 16 elements from registers, two to each.

    PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix A; "Matrix fragments for mma.m16n8k16" has the
    same places within a warp's 16 rows.
    """
    tile = np.zeros((64, DEPTH), np.float32)
    for i, name in enumerate(names):
        pairs = group.read(name, "u32")
        row, column = WARP * 16 + LANE // 4 + i % 2 * 8, LANE % 4 * 2 + i // 2 * 8
        tile[row, column] = format_.decode((pairs & 0xFFFF).astype(np.uint16))
        tile[row, column + 1] = format_.decode((pairs >> 16).astype(np.uint16))
    return tile


@instruction("wgmma.mma_async.sync.aligned")
def warpgroup_product(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """D (64 x N) += A (64 x 16) B (N x 16)^T, carried out when it is waited for.

    PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix D: thread t of warp w holds in register i row
    16 w + t / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (t % 4) + i % 2.
    """
    require(active is ALL, "a product by some of a warpgroup's threads")
    columns = int(re.fullmatch(r"m64n(\d+)k16", ins.words[4]).group(1))
    format_ = FORMATS[ins.words[-1]]
    names, left, right, scale, *immediate = ins.operands
    require(len(names) == columns // 2, "the accumulator's size")
    from_registers = isinstance(left, tuple)
    require(immediate == ([1, 1, 0] if from_registers else [1, 1, 0, 0]), "signs or transposition")
    keep = group.predicate(scale)
    require((keep == keep[0]).all(), "threads scale D differently")
    # A register of a descriptor is free again once the product is issued; those of A and D are not.
    descriptors = [None if from_registers else group.read(left, "u64"), group.read(right, "u64")]

    def carry_out() -> None:
        if from_registers:  # read only now, as the tensor cores may
            a = _registers_of_a(group, left, format_)
        else:
            a = _tile(group, descriptors[0], 64, format_)
        b = _tile(group, descriptors[1], columns, format_)
        product = a.astype(np.float64) @ b.astype(np.float64).T
        i = np.arange(len(names))[:, None]
        row, column = WARP * 16 + LANE // 4 + i // 2 % 2 * 8, i // 4 * 8 + LANE % 4 * 2 + i % 2
        values = product[row, column]
        if keep[0]:
            values += np.stack([group.read(name, "f32") for name in names])
        for name, value in zip(names, values.astype(np.float32), strict=True):
            group.write(name, value, ALL)

    group.batch.append(carry_out)


@instruction("mma.sync.aligned.m16n8k16.row.col.f32")
def warp_product(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """D (16 x 8) = A (16 x 16) B (16 x 8) + C in each warp; PTX ISA, "Matrix fragments for mma.m16n8k16"."""
    require(active is ALL, "a product by some of a warp's threads")
    format_ = FORMATS[ins.words[-2]]
    results, left, right, addends = ins.operands
    a = _registers_of_a(group, left, format_).reshape(4, 16, DEPTH)
    b = np.zeros((4, DEPTH, 8), np.float32)
    for i, name in enumerate(right):
        pairs, depth = group.read(name, "u32"), LANE % 4 * 2 + i * 8
        b[WARP, depth, LANE // 4] = format_.decode((pairs & 0xFFFF).astype(np.uint16))
        b[WARP, depth + 1, LANE // 4] = format_.decode((pairs >> 16).astype(np.uint16))
    product = a.astype(np.float64) @ b.astype(np.float64)
    sums = [
        product[WARP, LANE // 4 + i // 2 * 8, LANE % 4 * 2 + i % 2] + group.read(name, "f32")
        for i, name in enumerate(addends)
    ]
    for name, value in zip(results, sums, strict=True):
        group.write(name, value.astype(np.float32), ALL)
