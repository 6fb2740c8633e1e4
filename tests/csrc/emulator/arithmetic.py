"""Instructions on registers alone: arithmetic, comparison, selection, conversion.

PTX ISA, "Integer Arithmetic Instructions" to "Data Movement and Conversion Instructions". Approximate instructions
(``div.approx``, ``ex2.approx``, ``tanh.approx``) give the exact result, rounded.
"""

from __future__ import annotations

import numpy as np

from .formats import FORMATS
from .machine import LANES, TYPES, Warpgroup, instruction, require
from .ptx import Instruction

FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "rcp": np.reciprocal,
    "tanh": np.tanh,
    # With one NaN the other operand is the result, except with .NaN.
    "min": np.fmin,
    "max": np.fmax,
    "copysign": lambda sign, size: np.copysign(size, sign),
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(*(f"{name}." for name in FLOAT), "fma.rn", "mad.rn")
def float_arithmetic(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    if ins.words[-1] != "f32":
        return integer_arithmetic(group, ins, active)
    values = [group.read(operand, "f32") for operand in ins.operands[1:]]
    if ins.words[0] in ("fma", "mad"):
        a, b, c = (value.astype(np.float64) for value in values)
        result = a * b + c
    elif "NaN" in ins.words:
        result = {"min": np.minimum, "max": np.maximum}[ins.words[0]](*values)
    else:
        result = FLOAT[ins.words[0]](*values)
    return group.write(ins.operands[0], result.astype(np.float32), active)


@instruction("mad.lo", "rem.")
def integer_arithmetic(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    name, kind = ins.words[0], ins.words[-1]
    values = [group.read(operand, kind) for operand in ins.operands[1:]]
    if name == "mul" and ins.words[1] in ("wide", "hi"):
        result = values[0].astype(TYPES[kind[0] + "64"]) * values[1]
        if ins.words[1] == "hi":
            result = (result >> 32).astype(TYPES[kind])
    elif name == "mad":
        result = values[0] * values[1] + values[2]
    elif name in ("div", "rem"):  # truncates; a thread that is not active may hold 0
        a, b = values[0].astype(np.int64), np.where(values[1] == 0, 1, values[1]).astype(np.int64)
        quotient = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
        result = (quotient if name == "div" else a - quotient * b).astype(TYPES[kind])
    else:
        result = FLOAT[name](*values)
    group.write(ins.operands[0], result, active)


@instruction("and.", "or.", "xor.", "not.")
def logic(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    kind = ins.words[-1]
    values = [
        group.predicate(operand) if kind == "pred" else group.read(operand, kind)
        for operand in ins.operands[1:]
    ]
    result = ~values[0] if ins.words[0] == "not" else LOGIC[ins.words[0]](*values)
    group.write(ins.operands[0], result, active)


@instruction("shl.", "shr.")
def shift(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    value = group.read(ins.operands[1], ins.words[-1])
    by = group.read(ins.operands[2], "u32").astype(value.dtype)
    require((by[active] < value.itemsize * 8).all(), "a shift by all bits or more")
    group.write(ins.operands[0], value << by if ins.words[0] == "shl" else value >> by, active)


@instruction("bfi.b32")
def bit_field_insert(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    field, into = (group.read(operand, "u32") for operand in ins.operands[1:3])
    position, length = ins.operands[3:]
    mask = np.uint32(((1 << length) - 1) << position)
    group.write(ins.operands[0], (into & ~mask) | (field << np.uint32(position) & mask), active)


@instruction("bfe.u32")
def bit_field_extract(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    position, length = ins.operands[2:]
    value = group.read(ins.operands[1], "u32") >> np.uint32(position)
    group.write(ins.operands[0], value & np.uint32((1 << length) - 1), active)


@instruction("lop3.b32")
def logic_of_three(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    a, b, c = (group.read(operand, "u32") for operand in ins.operands[1:4])
    result = np.zeros(LANES, np.uint32)
    for row in range(8):
        if ins.operands[4] >> row & 1:
            terms = zip((a, b, c), (4, 2, 1), strict=True)
            result |= np.bitwise_and.reduce([x if row & bit else ~x for x, bit in terms])
    group.write(ins.operands[0], result, active)


@instruction("setp.")
def set_predicate(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    comparison, kind = ins.words[1], ins.words[-1]
    a, b = (group.read(operand, kind) for operand in ins.operands[1:])
    result = COMPARISONS[comparison[:2]](a, b)
    if comparison[2:] == "u":  # true as well where an operand is NaN
        result |= np.isnan(a) | np.isnan(b)
    elif comparison == "ne" and kind == "f32":  # the ordered form is false there
        result &= ~(np.isnan(a) | np.isnan(b))
    group.write(ins.operands[0], result, active)


@instruction("selp.")
def select(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    a, b = (group.read(operand, ins.words[-1]) for operand in ins.operands[1:3])
    group.write(ins.operands[0], np.where(group.predicate(ins.operands[3]), a, b), active)


@instruction("mov.")
def move(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Also the packing and unpacking of two halves in one register."""
    target, source = ins.operands
    kind = ins.words[-1]
    half = {"b64": "u32", "b32": "u16"}.get(kind, kind)
    if isinstance(target, tuple):
        value, bits = group.read(source, kind), int(half[1:])
        group.write(target[0], value.astype(TYPES[half]), active)
        group.write(target[1], (value >> value.dtype.type(bits)).astype(TYPES[half]), active)
    elif isinstance(source, tuple):
        low, high = (group.read(part, half).astype(TYPES[kind]) for part in source)
        group.write(target, low | high << TYPES[kind](int(half[1:])), active)
    else:
        group.write(target, group.read(source, kind), active)


@instruction("cvt.")
def convert(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    to, source = ins.words[-2:]
    if to in ("bf16x2", "f16x2"):  # the first operand goes into the high half
        high, low = (
            FORMATS[to[:-2]].encode(group.read(operand, "f32")).astype(np.uint32)
            for operand in ins.operands[1:]
        )
        result = low | high << np.uint32(16)
    elif source in FORMATS:
        require(to == "f32", f"no conversion to {to}")
        result = FORMATS[source].decode(group.read(ins.operands[1], "u16"))
    else:
        result = group.read(ins.operands[1], source).astype(TYPES[to])
    group.write(ins.operands[0], result, active)


@instruction("cvta.")
def convert_address(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    group.write(ins.operands[0], group.read(ins.operands[1], "u64"), active)
