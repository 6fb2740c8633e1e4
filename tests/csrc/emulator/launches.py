"""Launches: the matrices, the parameter block and the maps as the host's own code gives them, executed and compared."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# The instructions register themselves.
from . import accesses, arithmetic, bulk_copies, synchronisation, tensor_cores  # noqa: F401
from .exact import Bounded, activate
from .formats import FORMATS, Format
from .machine import Cluster, EmulationError, require
from .memory import GlobalMemory, Matrix, TensorMap
from .ptx import Kernel

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")  # lowrank.h's Activation


@dataclass(frozen=True)
class Launch:
    """A call and the tile that serves it.

    Attributes:
        kind: "linear" (tile: rows, rank; sizes: M, K, N, R, CTAs of a cluster, of those that share a row tile, clusters
            at a time), "ffn" (rank, CTAs; M, K, F, N, R1, R2, clusters at a time) or "ampere" (rank; M, K, N, R,
            splits).
        base: where the dynamic shared memory starts.
        infinite_row: the row of x that has an Inf, if any.
        special_bias: the first elements of the bias under the activation, such as infinities.
        seed, order: what the numbers, and the order of events, are drawn from.
    """

    kind: str
    tile: tuple[int, ...]
    sizes: tuple[int, ...]
    activation: str = "none"
    bias: bool = True
    hidden: bool = True
    dtype: str = "bf16"
    base: int = 1024
    infinite_row: int | None = None
    special_bias: tuple[float, ...] = ()
    seed: int = 0
    order: int = 0

    @property
    def file(self) -> str:
        """The name of the tile's file in csrc, without its suffix."""
        name = "linear" if self.kind == "ampere" else self.kind
        arch = "sm80" if self.kind == "ampere" else "sm90a"
        return "_".join([name, *map(str, self.tile), arch])


@dataclass
class Outcome:
    """What a launch left behind, and the clusters that ran."""

    launch: Launch
    matrices: dict[str, Matrix]
    clusters: list[Cluster] = field(default_factory=list)


def _block(launch: Launch, program: Path) -> list[list[str]]:
    """What ``trace block`` prints of a launch, in words."""
    options = (FORMATS[launch.dtype].number, ACTIVATIONS.index(launch.activation))
    arguments = (*launch.tile, *launch.sizes, *options, int(launch.bias), int(launch.hidden))
    command = [str(program), "block", launch.kind, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, f"there is no such tile: {launch}")
    return [line.split() for line in done.stdout.splitlines()]


def _ranks(launch: Launch) -> dict[str, int]:
    """The rank, without padding, of each matrix that has one."""
    if launch.kind == "ffn":
        first, second = launch.sizes[4:6]
        pairs = {("down1", "up1", "p"): first, ("down2", "up2", "q"): second}
    else:
        pairs = {("down", "up", "hidden"): launch.sizes[3]}
    return {name: rank for names, rank in pairs.items() for name in names}


def _fill(launch: Launch, name: str, matrix: Matrix, draw: np.random.Generator) -> None:
    """Inputs: normal numbers, factors scaled so that results are of size 1, and zero beyond the rank."""
    if name in ("y", "hidden", "p", "q"):
        return
    values = draw.normal(size=matrix.inner.shape)
    rank = _ranks(launch).get(name)
    if rank is not None:
        values /= (matrix.columns if name.startswith("down") else rank) ** 0.5
        if name.startswith("down"):
            values[rank:] = 0
        else:
            values[:, rank:] = 0
    if name == "x" and launch.infinite_row is not None:
        values[launch.infinite_row, matrix.columns // 2] = np.inf
    if name == ("bias1" if launch.kind == "ffn" else "bias"):
        values[0, : len(launch.special_bias)] = launch.special_bias
    matrix.inner[:] = FORMATS[launch.dtype].encode(values)


def execute(launch: Launch, kernels: Sequence[Kernel], program: Path) -> Outcome:
    """Run all clusters of a launch, each in an order of its own.

    Args:
        kernels: those of the tile's file.
        program: ``toolchain.trace``.

    Raises:
        EmulationError: a rule of the PTX ISA is broken, or threads wait for ever.
    """
    lines, draw = _block(launch, program), np.random.default_rng(launch.seed)
    memory, names = GlobalMemory(), {}
    maps: dict[int, TensorMap] = {}
    for word, *rest in lines:
        if word == "matrix":
            name, address, *shape = rest[0], *map(int, rest[1:])
            names[name] = memory.matrices[address] = Matrix.blank(*shape)
            _fill(launch, name, names[name], draw)
        elif word == "map":
            offset, address, width, height = map(int, rest)
            maps[offset] = TensorMap(memory.matrices[address], width, height)
        elif word == "launch":
            clusters, size, threads, shared_bytes = map(int, rest)
        else:
            block = bytes.fromhex(rest[0])
    [kernel] = [k for k in kernels if FORMATS[launch.dtype].kernel in k.name]
    require(0 <= kernel.parameter_bytes - len(block) < 128, "the block's size is not the kernel's")
    outcome, order = Outcome(launch, names), random.Random(f"{launch.seed}/{launch.order}")
    for index in range(clusters):
        place = (memory, index, size, threads, shared_bytes, order, launch.base)
        outcome.clusters.append(Cluster(kernel, block, maps, *place))
        with np.errstate(all="ignore"):
            outcome.clusters[-1].run()
    return outcome


def check(outcome: Outcome) -> None:
    """Hold what a launch wrote to float64.

    Every element is written once; what pads the rank is zero, also in a row with an Inf; and every other element is
    the exact result rounded, or its neighbour where float32 sums may fall on the other side of a tie.

    Raises:
        EmulationError: what is wrong, and where.
    """
    launch, matrices = outcome.launch, outcome.matrices
    format_, ranks = FORMATS[launch.dtype], _ranks(launch)
    rows = np.arange(len(matrices["x"].values)) != launch.infinite_row
    for name, right in _expected(outcome, format_).items():
        if name not in matrices:
            continue
        require(matrices[name].written_once(), f"{name} is not written once")
        values = format_.decode(matrices[name].inner).astype(np.float64)
        if name in ranks:
            require((values[:, ranks[name] :] == 0).all(), f"{name} is not 0 beyond its rank")
        with np.errstate(invalid="ignore"):
            near = np.abs(values - right.value) <= right.error
        same = (values == right.value) | (np.isnan(values) & np.isnan(right.value))
        wrong = ~(near | same) & rows[:, None]
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise EmulationError(
                f"{wrong.sum()} of {wrong.size} elements of {name} are wrong, the first at ({row}, {column}): "
                f"{values[row, column]} and not {right.value[row, column]}"
            )


def _expected(outcome: Outcome, format_: Format) -> dict[str, Bounded]:
    """The results by name. Intermediates that the launch has stored are taken as stored."""
    launch, matrices = outcome.launch, outcome.matrices

    def decoded(name: str) -> np.ndarray:
        return format_.decode(matrices[name].inner).astype(np.float64)

    def number(name: str) -> np.ndarray:
        return np.where(np.isfinite(decoded(name)), decoded(name), 0)

    def linear(x: Bounded, weight: str, bias: str = "") -> Bounded:
        product = x.times(number(weight))
        return product.plus(decoded(bias)) if bias in matrices else product

    def stored(name: str, value: Bounded) -> Bounded:
        return Bounded(number(name)) if name in matrices else value

    x = Bounded(number("x"))
    if launch.kind != "ffn":
        hidden = linear(x, "down").rounded(format_)
        y = activate(launch.activation, linear(stored("hidden", hidden), "up", "bias"))
        return {"hidden": hidden, "y": y.rounded(format_)}
    p = linear(x, "down1").rounded(format_)
    neurons = activate(launch.activation, linear(stored("p", p), "up1", "bias1")).rounded(format_)
    q = linear(neurons, "down2").rounded(format_)
    y = linear(stored("q", q), "up2", "bias2").rounded(format_)
    return {"p": p, "q": q, "y": y}
