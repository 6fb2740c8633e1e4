"""Clusters of CTAs of warpgroups, and the order in which they run.

A warpgroup is 128 threads in lockstep. Where they diverge, those at the lowest instruction go on until the others are
met, which is how nvcc lays out structured code. Between warpgroups, and between them and what is under way, the order
is random.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .memory import GlobalMemory, SharedMemory, TensorMap
from .ptx import Instruction, Kernel, Operand

LANES = 128
ALL = np.ones(LANES, bool)
TYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}").type
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for bits in (16, 32, 64)
}
PARAMETERS = 1 << 32  # the generic address of the parameter block
# The bits of an address of shared memory above these name the CTA of the cluster, counted from 1.
RANK_SHIFT = 24
WAIT = False  # what an instruction returns that must be tried again

Action = Callable[[], None]
Handler = Callable[["Warpgroup", Instruction, np.ndarray], bool | None]
HANDLERS: dict[str, Handler] = {}


class EmulationError(AssertionError):
    """The program did what the PTX ISA forbids, or waits for ever."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise EmulationError(message)


def instruction(*prefixes: str) -> Callable[[Handler], Handler]:
    """Registers what executes the opcodes that start so; the longest prefix counts."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(prefixes, handler))
        return handler

    return register


def handler_of(opcode: str) -> Handler:
    matching = [prefix for prefix in HANDLERS if opcode.startswith(prefix)]
    require(matching, f"the emulator has no {opcode}")
    return HANDLERS[max(matching, key=len)]


@dataclass
class Barrier:
    """An mbarrier object: a phase ends when its arrivals and its bytes have come.

    PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier": "Phase of the mbarrier object" and
    "Tracking asynchronous operations by the mbarrier object" (tx-count). ``orders`` collects the qualifiers of remote
    arrivals and of waits.
    """

    expected: int
    pending: int = field(init=False)
    bytes: int = 0
    phase: int = 0
    orders: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pending = self.expected

    def arrive(self, bytes_: int = 0) -> None:
        require(self.pending > 0, "an arrival too many at an mbarrier")
        self.pending -= 1
        self.complete(-bytes_)

    def complete(self, bytes_: int) -> None:
        self.bytes -= bytes_
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class Meeting:
    """A barrier that warpgroups wait at: ``bar.sync`` or ``barrier.cluster``."""

    arrived: list[Warpgroup] = field(default_factory=list)
    generation: int = 0

    def arrive(self, group: Warpgroup, groups: int) -> bool:
        """Whether this was the last one; the barrier is then ready for its next use."""
        self.arrived.append(group)
        if len(self.arrived) < groups:
            return False
        self.arrived.clear()
        self.generation += 1
        return True


class Cta:
    """One CTA: its shared memory, its mbarriers by address, its named barriers."""

    def __init__(self, cluster: Cluster, rank: int, threads: int, shared_bytes: int) -> None:
        self.cluster, self.rank, self.threads = cluster, rank, threads
        self.shared = SharedMemory(cluster.base + shared_bytes)
        self.barriers: dict[int, Barrier] = {}
        self.named: dict[int, Meeting] = defaultdict(Meeting)
        self.remote_stores: list = []  # ordinary stores at other CTAs that are not known to have been made
        self.groups = [Warpgroup(self, index) for index in range(threads // LANES)]


class Warpgroup:
    """128 threads: their registers, where they are, and what they have under way."""

    def __init__(self, cta: Cta, index: int) -> None:
        self.cta, self.index = cta, index
        self.counters = np.zeros(LANES, np.int64)
        self.done = False
        self.waiting_at: int | None = None  # the generation of the meeting that it waits for
        self.cluster_generation = -1
        self.batch: list[Action] = []  # products, or copies of cp.async, that are not committed
        self.batches: list[list[Action]] = []
        self.bulk_stores: list[
            tuple[int, Action]
        ] = []  # by thread: stores whose source is not read
        cluster = cta.cluster
        lanes = np.arange(LANES, dtype=np.uint32) + np.uint32(index * LANES)
        self.registers: dict[str, np.ndarray] = {"%tid.x": lanes}
        for name, value in (
            ("%cluster_ctarank", cta.rank),
            ("%clusterid.x", cluster.index),
            ("%ctaid.x", cluster.index * cluster.size + cta.rank),
        ):
            self.registers[name] = np.full(LANES, value, np.uint32)

    # -- registers --
    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """The operand's 128 values as that type; not to be written to."""
        wanted = TYPES[kind]
        if isinstance(operand, int):
            bits = np.dtype(wanted).itemsize * 8
            value = np.full(LANES, operand % (1 << bits), f"u{bits // 8}")
        elif operand in self.registers:
            value = self.registers[operand]
        elif operand.startswith("%"):
            raise EmulationError(f"{operand} is read before it is written")
        elif operand.endswith("_param_0"):
            value = np.full(LANES, PARAMETERS, np.uint64)
        else:  # the dynamic shared memory
            value = np.full(LANES, self.cta.cluster.base, np.uint32)
        return value.view(wanted)

    def predicate(self, name: str) -> np.ndarray:
        return self.registers[name]

    def write(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if name == "_":
            return
        if value.dtype != bool:
            value = value.view(f"u{value.itemsize}")
        if active is not ALL:
            value = np.where(active, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def addresses(self, operand: Operand, kind: str = "u32") -> np.ndarray:
        """Where ``[base+offset]`` points, as int64."""
        return self.read(operand.base, kind).astype(np.int64) + operand.offset

    def place(self, address: int) -> tuple[Cta, int]:
        """The CTA and the offset that an address of the cluster's shared memory means."""
        rank = int(address) >> RANK_SHIFT
        return (self.cta.cluster.ctas[rank - 1] if rank else self.cta), int(address) & (
            (1 << RANK_SHIFT) - 1
        )

    # -- steps --
    def step(self) -> bool:
        """Executes one instruction of the threads that are furthest behind; False if they must wait."""
        at = int(self.counters.min())
        here = self.counters == at
        active = here = ALL if here.all() else here
        handler, current = self.cta.cluster.program[at]
        if current.predicate is not None:
            guard = self.predicate(current.predicate)
            active = here & (~guard if current.negated else guard)
            active = ALL if active.all() else active
        if current.opcode in ("bra", "bra.uni"):
            self.counters[here] = at + 1
            self.counters[active] = self.cta.cluster.kernel.labels[current.operands[0]]
            return True
        if current.opcode == "ret":
            require(active is ALL, "threads leave apart from each other")
            self.done = True
            return True
        if active.any() and handler(self, current, active) is WAIT:
            return False
        self.counters[here] = at + 1
        return True


class Cluster:
    """One cluster of a launch. ``run`` executes it to its end.

    Args:
        kernel: what to run; ``parameters`` are the bytes of its block, in which ``maps`` lie by their offset.
        memory: global memory, which other clusters of the launch share.
        size: CTAs, of ``threads`` threads and ``shared_bytes`` of dynamic shared memory each, from address ``base`` on.
        order: chooses who goes on and what comes to pass.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: bytes,
        maps: dict[int, TensorMap],
        memory: GlobalMemory,
        index: int,
        size: int,
        threads: int,
        shared_bytes: int,
        order: random.Random,
        base: int = 1024,
    ) -> None:
        self.kernel, self.parameters, self.maps, self.memory = kernel, parameters, maps, memory
        self.index, self.size, self.base, self.order = index, size, base, order
        opcodes = {current.opcode for current in kernel.instructions} - {"bra", "bra.uni", "ret"}
        handlers = {opcode: handler_of(opcode) for opcode in opcodes}
        self.program = [(handlers.get(i.opcode), i) for i in kernel.instructions]
        self.pending: list[Action] = []
        self.meeting = Meeting()
        self.ctas: list[Cta] = []
        self.ctas += [Cta(self, rank, threads, shared_bytes) for rank in range(size)]

    def later(self, action: Action) -> None:
        """The action comes to pass at some later time."""
        self.pending.append(action)

    def _one_comes_to_pass(self) -> None:
        self.pending.pop(self.order.randrange(len(self.pending)))()

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            EmulationError: they wait for ever, or break a rule.
        """
        groups = [group for cta in self.ctas for group in cta.groups]
        while live := [group for group in groups if not group.done]:
            self.order.shuffle(live)
            moved = False
            for group in live:
                for _ in range(self.order.randrange(1, 4000)):
                    if group.done or not self._step(group):
                        break
                    moved = True
                if self.pending and self.order.random() < 0.5:
                    self._one_comes_to_pass()
                    moved = True
            if not moved:
                require(self.pending, f"deadlock: {[self._position(group) for group in live]}")
                self._one_comes_to_pass()
        while self.pending:
            self._one_comes_to_pass()
        for cta in self.ctas:
            for address, barrier in cta.barriers.items():
                require(barrier.bytes == 0, f"the mbarrier at {address} still awaits bytes")

    def _step(self, group: Warpgroup) -> bool:
        try:
            return group.step()
        except (EmulationError, IndexError, KeyError) as error:
            raise EmulationError(f"{error!r} at {self._position(group)}") from error

    def _position(self, group: Warpgroup) -> str:
        at = int(group.counters.min())
        return f"CTA {group.cta.rank} warpgroup {group.index}: {at} {self.program[at][1]}"
