"""Barriers and fences: ``mbarrier``, ``bar``, ``barrier.cluster``, ``fence``, and the register quota."""

from __future__ import annotations

import numpy as np

from .accesses import release_cluster
from .machine import ALL, LANES, WAIT, Barrier, Warpgroup, instruction, require
from .ptx import Instruction


@instruction("mbarrier.init")
def init(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    places, counts = group.addresses(ins.operands[0]), group.read(ins.operands[1], "u32")
    for thread in np.flatnonzero(active):
        group.cta.barriers[int(places[thread])] = Barrier(int(counts[thread]))


@instruction("mbarrier.arrive")
def arrive(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """At this CTA's barrier at once, at another's some time later.

    PTX ISA, "mbarrier.arrive": the release that it makes is of the CTA's scope unless it says ``.release.cluster``.
    """
    if "release" in ins.words and "cluster" in ins.words[: ins.words.index("release") + 2]:
        release_cluster(group, active)
    places = group.addresses(ins.operands[1])
    for thread in np.flatnonzero(active):
        cta, offset = group.place(places[thread])
        barrier = cta.barriers[offset]
        if "expect_tx" in ins.words:
            barrier.arrive(int(group.read(ins.operands[2], "u32")[thread]))
        elif cta is group.cta:
            barrier.arrive()
        else:
            barrier.orders.add("release.cluster" if "release" in ins.words else "arrive")
            cta.cluster.later(barrier.arrive)


@instruction("mbarrier.try_wait.parity")
def try_wait(group: Warpgroup, ins: Instruction, active: np.ndarray) -> bool | None:
    """Whether the phase of that parity is over; PTX ISA, "mbarrier.test_wait, mbarrier.try_wait"."""
    places, parities = group.addresses(ins.operands[1]), group.read(ins.operands[2], "u32")
    place, parity = int(places[active][0]), int(parities[active][0])
    same = (places[active] == place) & (parities[active] == parity)
    require(same.all(), "threads wait for different barriers")
    barrier = group.cta.barriers[place]
    barrier.orders.add("acquire.cluster" if "acquire" in ins.words else "wait")
    if barrier.phase % 2 == parity:
        return WAIT
    return group.write(ins.operands[0], np.ones(LANES, bool), active)


@instruction("bar.sync")
def meet(group: Warpgroup, ins: Instruction, active: np.ndarray) -> bool | None:
    """Warpgroups of the CTA wait for each other; what they stored is then known to all of them."""
    require(active is ALL, "threads meet apart from each other")
    cta, meeting = group.cta, group.cta.named[ins.operands[0]]
    threads = ins.operands[1] if len(ins.operands) > 1 else cta.threads
    if group.waiting_at is None:
        group.waiting_at = meeting.generation
        together = [*meeting.arrived, group]
        if meeting.arrive(group, threads // LANES):
            for store in cta.remote_stores:
                store.met |= store.group in together
    if meeting.generation == group.waiting_at:
        return WAIT
    group.waiting_at = None
    return None


@instruction("barrier.cluster.arrive")
def cluster_arrive(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """PTX ISA, "barrier.cluster": with ``.release`` (the default) all that these threads stored is then there."""
    require(active is ALL, "threads arrive apart from each other")
    release_cluster(group, active)
    cluster = group.cta.cluster
    group.cluster_generation = cluster.meeting.generation
    cluster.meeting.arrive(group, sum(len(cta.groups) for cta in cluster.ctas))


@instruction("barrier.cluster.wait")
def cluster_wait(group: Warpgroup, ins: Instruction, active: np.ndarray) -> bool | None:
    over = group.cta.cluster.meeting.generation > group.cluster_generation
    return None if over else WAIT


@instruction("fence.proxy.async")
def publish(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    group.cta.shared.publish(group.index, active)


@instruction("fence.acq_rel.cluster")
def fence_cluster(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    release_cluster(group, active)


@instruction("fence.mbarrier_init", "bar.warp.sync", "prefetch.tensormap")
def nothing(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    """Of no effect here: initialisation is at once, a warp's threads never part, and maps are always there."""


@instruction("setmaxnreg", "wgmma.fence")
def together(group: Warpgroup, ins: Instruction, active: np.ndarray) -> None:
    require(active is ALL, "a warpgroup's instruction by some of its threads")
