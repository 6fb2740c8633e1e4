"""Parses what nvcc writes: the kernels of a PTX file, as lists of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

# A register or symbol; an integer, or the bits of a float; a vector of those.
Scalar = str | int
Operand = "Scalar | tuple[Scalar, ...] | Address"


@dataclass(frozen=True)
class Address:
    """``[base+offset]``, or ``[base, {column, row}]`` for a tensor map."""

    base: Scalar
    offset: int = 0
    coordinates: tuple[Scalar, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands;`` with ``words`` the parts of the opcode between its dots."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False

    @cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(self.opcode.replace("::", ":").split("."))

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(map(str, self.operands))}"


@dataclass(frozen=True)
class Kernel:
    """An entry point: its instructions, where its labels point, and the bytes of its parameter block."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameter_bytes: int


def kernels(text: str) -> list[Kernel]:
    """Every kernel of a PTX file.

    Example:
        >>> body = "$L: @!%p1 bra $L; st.u32 [%r1+4], {%r2, 7};"
        >>> [kernel] = kernels(".visible .entry f(.param .b8 f_param_0[64]) { " + body + " }")
        >>> print(*kernel.instructions, sep="\\n")
        @!%p1 bra $L
        st.u32 Address(base='%r1', offset=4, coordinates=()), ('%r2', 7)
    """
    return [_kernel(entry) for entry in re.split(r"(?m)^\.visible \.entry\s+", text)[1:]]


def _kernel(text: str) -> Kernel:
    head, body = text.split("{", 1)
    body = re.sub(r"//[^\n]*", "", body)
    # The braces of blocks go; those of vectors stand after an operand or an opcode and stay.
    body = re.sub(r"(^|;)\s*[{}]", r"\1\n", body, flags=re.MULTILINE)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in map(str.strip, body.split(";")):
        while label := re.match(r"(\$\w+):\s*", statement):
            labels[label.group(1)] = len(instructions)
            statement = statement[label.end() :]
        if statement and statement[0] not in ".{}":
            instructions.append(_instruction(statement))
    size = re.search(r"\[(\d+)\]", head)
    return Kernel(
        head.split("(")[0].strip(), tuple(instructions), labels, int(size.group(1)) if size else 0
    )


def _instruction(statement: str) -> Instruction:
    predicate, negated = None, False
    if statement.startswith("@"):
        guard, statement = statement.split(None, 1)
        predicate, negated = guard.lstrip("@!"), guard[1] == "!"
    opcode, rest = [*statement.split(None, 1), ""][:2]
    operands = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+", rest)
    return Instruction(opcode, tuple(map(_operand, operands)), predicate, negated)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_scalar(part.strip()) for part in text.strip("{}").split(","))
    if not text.startswith("["):
        return _scalar(text)
    base, _, coordinates = text.strip("[]").partition(",")
    if coordinates:
        return Address(
            _scalar(base.strip()), 0, tuple(map(_scalar, re.findall(r"[^\s,{}]+", coordinates)))
        )
    place = re.fullmatch(r"(.+?)(?:\+(-?\d+))?", base.strip())
    return Address(_scalar(place.group(1)), int(place.group(2) or 0))


def _scalar(text: str) -> Scalar:
    """A name, or a number; a float such as ``0f3F800000`` is given by its bits."""
    if text.startswith("0f"):
        return int(text[2:], 16)
    return int(text, 0) if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", text) and text[-1] != "_" else text
