"""TMA and bulk copies: ``cp.async.bulk``. Each is issued by one thread and carried out by the async proxy."""

from __future__ import annotations

import numpy as np

from .machine import PARAMETERS, Warpgroup, instruction, require
from .memory import TensorMap
from .ptx import Address, Instruction

TENSOR = "cp.async.bulk.tensor.2d"
LOAD = f"{TENSOR}.shared::cluster.global.mbarrier::complete_tx::bytes"


def _only(active: np.ndarray) -> int:
    (threads,) = np.nonzero(active)
    require(len(threads) == 1, "a bulk copy is issued by more than one thread")
    return int(threads[0])


def _box(group: Warpgroup, operand: Address, thread: int) -> tuple[TensorMap, int, int]:
    """The map, the column and the row of ``[map, {column, row}]``."""
    map_ = int(group.read(operand.base, "u64")[thread]) - PARAMETERS
    column, row = (int(group.read(part, "s32")[thread]) for part in operand.coordinates)
    return group.cta.cluster.maps[map_], column, row


@instruction(LOAD)
def load(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """A box into this CTA's shared memory, or at the same place into each that the mask names; zeros outside of the
    matrix.

    PTX ISA, "cp.async.bulk.tensor", "Tensors" ("Out of bound access"): the barrier of each CTA at the same offset
    counts the bytes of the full box.
    """
    thread = _only(active)
    map_, column, row = _box(group, ins.operands[1], thread)
    target, barrier = (int(group.addresses(ins.operands[i])[thread]) for i in (0, 2))
    require(target % 128 == 0, "a box that does not start on 128 bytes")
    ctas = [group.cta]
    if ins.words[-1] == "multicast:cluster":
        mask = int(group.read(ins.operands[3], "u16")[thread])
        require(mask >> group.cta.cluster.size == 0, "a multicast to a CTA that is not there")
        ctas = [cta for cta in group.cta.cluster.ctas if mask >> cta.rank & 1]
    rows, columns, inside = map_.box(column, row)
    values = np.zeros(inside.shape, np.uint16)
    values[inside] = map_.matrix.values[rows[inside], columns[inside]]
    places = map_.addresses(target)
    for cta in ctas:

        def arrive(cta=cta) -> None:
            cta.shared.store_async(places, (values & 0xFF).astype(np.uint8))
            cta.shared.store_async(places + 1, (values >> 8).astype(np.uint8))
            cta.barriers[barrier].complete(map_.bytes)

        group.cta.cluster.later(arrive)


@instruction(f"{TENSOR}.global.shared::cta.bulk_group")
def store(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """A box out of shared memory; what lies outside of the matrix is not written.

    PTX ISA, "cp.async.bulk.wait_group": the source may change once ``.read`` has been waited for, so it is read no
    sooner.
    """
    thread = _only(active)
    map_, column, row = _box(group, ins.operands[0], thread)
    source = int(group.addresses(ins.operands[1])[thread])
    require(source % 128 == 0, "a box that does not start on 128 bytes")
    rows, columns, inside = map_.box(column, row)
    require(inside.any(), "a store of a box wholly outside of its matrix")

    def write() -> None:
        values = group.cta.shared.elements(map_.addresses(source))
        map_.matrix.values[rows[inside], columns[inside]] = values[inside]
        map_.matrix.writes[rows[inside], columns[inside]] += 1

    group.bulk_stores.append((thread, write))


@instruction("cp.async.bulk.commit_group")
def commit(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Stores are kept by thread; every wait here is for all of them."""


@instruction("cp.async.bulk.wait_group")
def wait(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    require(ins.operands[0] == 0, "a wait for some of the stores")
    for thread, write in group.bulk_stores:
        if active[thread]:
            write()
    group.bulk_stores = [entry for entry in group.bulk_stores if not active[entry[0]]]


@instruction("cp.async.bulk.shared::cluster.shared::cta")
def send(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Bytes to another CTA, whose barrier counts them; PTX ISA, "cp.async.bulk"."""
    thread = _only(active)
    target, to = group.place(group.addresses(ins.operands[0])[thread])
    source = int(group.addresses(ins.operands[1])[thread])
    bytes_ = int(group.read(ins.operands[2], "u32")[thread])
    owner, barrier = group.place(group.addresses(ins.operands[3])[thread])
    require(owner is target, "the barrier of another CTA than the one that is written to")
    require(to % 16 == source % 16 == bytes_ % 16 == 0, "a copy that is not aligned")
    shared = group.cta.shared

    def arrive() -> None:
        data = shared.asynchronous[source : source + bytes_].copy()
        target.shared.store_async(np.arange(to, to + bytes_), data)
        target.barriers[barrier].complete(bytes_)

    group.cta.cluster.later(arrive)
