"""Ordinary loads and stores, and the copies of Ampere: ``ld``, ``st``, ``mapa``, ``cp.async``, ``ldmatrix``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .machine import (
    ALL,
    LANES,
    PARAMETERS,
    RANK_SHIFT,
    TYPES,
    Cta,
    Warpgroup,
    instruction,
    require,
)
from .ptx import Instruction, Operand

THREADS = np.arange(LANES)
COPY_BYTES = 16


def vector(operand: Operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


@dataclass
class RemoteStore:
    """Ordinary stores into another CTA's shared memory, of the threads of ``waiting``.

    PTX ISA, "Memory Consistency Model", "Release and acquire patterns" and "Causality order": another CTA is sure to
    see them only after a release at cluster scope, by the thread that made them or by one that met it at a barrier
    since (``met``).
    """

    group: Warpgroup
    target: Cta
    addresses: np.ndarray
    data: np.ndarray
    waiting: np.ndarray
    met: bool = False

    def arrive(self, threads: np.ndarray = ALL) -> None:
        now = self.waiting & threads
        if now.any():
            self.target.shared.store(-1, now, self.addresses, self.data)
            self.target.shared.publish(-1, now)  # its own proxy's business, not the sender's
            self.waiting = self.waiting & ~now


def release_cluster(group: Warpgroup, threads: np.ndarray) -> None:
    """What these threads stored at other CTAs, or know to be stored, is there."""
    stores = group.cta.remote_stores
    for store in stores:
        if store.met or store.group is group:
            store.arrive(ALL if store.met else threads)
    group.cta.remote_stores = [store for store in stores if store.waiting.any()]


@instruction("ld.param")
def load_parameter(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places = np.unique(group.addresses(ins.operands[1], "u64")[active])
    require(len(places) == 1, "threads load different parameters")
    kind = ins.words[-1]
    size = 1 if kind == "u8" else np.dtype(TYPES[kind]).itemsize
    for i, target in enumerate(vector(ins.operands[0])):
        start = int(places[0]) - PARAMETERS + i * size
        value = int.from_bytes(group.cta.cluster.parameters[start : start + size], "little")
        width = "u16" if kind == "u8" else f"u{size * 8}"
        group.write(target, np.full(LANES, value, TYPES[width]), active)


@instruction("ld.global")
def load_global(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places = group.addresses(ins.operands[1], "u64")
    result = np.zeros((LANES, 2), np.uint16)
    for thread in np.flatnonzero(active):
        result[thread] = group.cta.cluster.memory.load(places[thread], 4)
    group.write(ins.operands[0], result.view(np.uint32)[:, 0].copy(), active)


@instruction("st.global")
def store_global(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places, values = group.addresses(ins.operands[0], "u64"), group.read(ins.operands[1], "u32")
    for thread in np.flatnonzero(active):
        halves = values[thread : thread + 1].view(np.uint16)
        group.cta.cluster.memory.store(places[thread], halves)


@instruction("ld.shared")
def load_shared(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places, targets = group.addresses(ins.operands[1]), vector(ins.operands[0])
    require((places[active] >> RANK_SHIFT == 0).all(), "a load from another CTA")
    require((places[active] % (4 * len(targets)) == 0).all(), "a load that is not aligned")
    places = np.where(active, places, 0)[:, None] + np.arange(4 * len(targets))
    data = group.cta.shared.generic[places].view(np.uint32)
    for i, target in enumerate(targets):
        group.write(target, data[:, i].copy(), active)


@instruction("st.shared")
def store_shared(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places = group.addresses(ins.operands[0])
    data = np.stack([group.read(value, "u32") for value in vector(ins.operands[1])], 1)
    data = data.view(np.uint8)
    require((places[active] % data.shape[1] == 0).all(), "a store that is not aligned")
    ranks = places >> RANK_SHIFT
    for rank in np.unique(ranks[active]):
        threads = active & (ranks == rank)
        target, _ = group.place(int(rank) << RANK_SHIFT)
        offsets = places & (1 << RANK_SHIFT) - 1
        require(len(np.unique(offsets[threads])) == threads.sum(), "two threads store to one place")
        if target is group.cta:
            target.shared.store(group.index, threads, offsets, data)
        else:
            store = RemoteStore(group, target, offsets, data, threads)
            group.cta.remote_stores.append(store)
            group.cta.cluster.later(store.arrive)


@instruction("mapa.")
def map_address(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    address, rank = (group.read(operand, "u32") for operand in ins.operands[1:])
    require((rank[active] < group.cta.cluster.size).all(), "a CTA that the cluster does not have")
    own = address & np.uint32((1 << RANK_SHIFT) - 1)
    group.write(ins.operands[0], own | rank + np.uint32(1) << np.uint32(RANK_SHIFT), active)


@instruction("cp.async.cg.shared")
def copy_async(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """16 bytes for each thread, or zeros where the size is 0; PTX ISA, "cp.async"."""
    targets, sizes = group.addresses(ins.operands[0]), group.read(ins.operands[3], "u32")
    sources, shared = group.addresses(ins.operands[1], "u64"), group.cta.shared
    memory = group.cta.cluster.memory
    require((targets[active] % COPY_BYTES == 0).all(), "a copy that is not aligned")
    require(np.isin(sizes[active], (0, COPY_BYTES)).all(), "a copy of some of its bytes")

    def arrive() -> None:
        data = np.zeros((LANES, COPY_BYTES), np.uint8)
        for thread in np.flatnonzero(active & (sizes > 0)):
            data[thread] = memory.load(sources[thread], COPY_BYTES).view(np.uint8)
        shared.store(group.index, active, targets, data)

    group.batch.append(arrive)


@instruction("cp.async.commit_group", "wgmma.commit_group")
def commit(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    require(active is ALL, "threads commit apart from each other")
    group.batches.append(group.batch)
    group.batch = []


@instruction("cp.async.wait_group", "wgmma.wait_group")
def wait_group(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Until at most so many batches are under way: only now does what they do come to pass.

    PTX ISA, "cp.async.wait_group", "wgmma.wait_group": accessing the registers and the memory of a batch before is
    undefined.
    """
    require(active is ALL, "threads wait apart from each other")
    while len(group.batches) > ins.operands[0]:
        for action in group.batches.pop(0):
            action()


@instruction("ldmatrix.sync.aligned.x4.m8n8.shared.b16")
def load_matrices(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Thread 8 i + r of a warp points to row r of matrix i, and thread t gets elements 2 (t % 4) and the next of row
    t / 4.

    PTX ISA, "Warp-level matrix load instruction: ldmatrix".
    """
    require(active is ALL, "threads load matrices apart from each other")
    rows = group.addresses(ins.operands[1])
    require((rows % 16 == 0).all(), "a row of a matrix that is not aligned")
    for i, target in enumerate(ins.operands[0]):
        places = rows[THREADS // 32 * 32 + i * 8 + THREADS % 32 // 4] + THREADS % 4 * 4
        data = group.cta.shared.generic[places[:, None] + np.arange(4)].view(np.uint32)
        group.write(target, data[:, 0].copy(), active)
