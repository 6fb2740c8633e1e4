"""Runs the traces of tests/csrc/trace.cpp under orders that no GPU would choose, and checks what every order must keep.

Model: barriers count arrivals and bytes as mbarrier does; loads, copies and arrivals at other CTAs come to pass at any
later time, in any order, and a multicast reaches each CTA by itself; a product reads its operands until it is drained.
Checked: nobody waits forever, no barrier gets an arrival too many, nothing is overwritten while it is read or read
before it has come, every operand is the right one, and every element of y is made once.
"""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

X, DOWN, UP, UP1, DOWN2 = range(5)
DEPTH, ROW_BYTES, COLUMNS, NEURONS, CONSUMERS = 64, 128, 128, 64, 2
FULL, EMPTY, SLICE = 0, 8, 16


def run_trace(program: str, *arguments: object) -> list[list[str]]:
    """The lines of a trace, split into words."""
    text = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split() for line in text.splitlines()]


@dataclass
class Launch:
    """A parsed trace: the plan, the arrivals of every barrier, and every role's events."""

    plan: dict[str, int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    roles: dict[tuple[int, int, int], list[tuple]] = field(default_factory=dict)


def parse(lines: list[list[str]]) -> Launch:
    names = (
        "rows",
        "rank",
        "up_rank",
        "stages",
        "stage_bytes",
        "cluster",
        "columns",
        "clusters",
        "groups",
        "depth_steps",
        "units",
        "split_columns",
    )
    launch, events = Launch(), []
    for word, *rest in lines:
        if word == "plan":
            launch.plan |= dict(zip(names, map(int, rest), strict=True))
        elif word == "neurons":
            launch.plan |= {"neuron_steps": int(rest[0]), "held": int(rest[1])}
        elif word == "barrier":
            launch.counts[int(rest[0])] = int(rest[1])
        elif word == "role":
            events = launch.roles.setdefault(tuple(map(int, rest)), [])
        else:
            events.append(
                (word, *(int(part) if part.lstrip("-").isdigit() else part for part in rest))
            )
    return launch


class Barrier:
    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def add(self, arrivals: int = 0, bytes_: int = 0) -> None:
        assert self.pending >= arrivals, "an arrival too many"
        self.pending -= arrivals
        self.bytes += bytes_
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Worker:
    """A role's state: where it is in its events, and for a consumer what its accumulators hold."""

    def __init__(self, events: list[tuple]) -> None:
        self.events, self.at = events, 0
        self.reading: list[list[tuple]] = []
        self.hidden, self.out, self.parts = [], [], []
        self.neurons = self.activated = self.rounded = None
        self.slices: dict[tuple, int] = {}


class Cluster:
    """One cluster of a launch; ``written`` collects the tiles of y that it stores."""

    def __init__(
        self, launch: Launch, cluster: int, order: random.Random, policy: str, written: list[tuple]
    ) -> None:
        self.plan, self.order, self.policy, self.written = launch.plan, order, policy, written
        size, plan = self.plan["cluster"], self.plan
        self.barriers = [{b: Barrier(n) for b, n in launch.counts.items()} for _ in range(size)]
        self.slots = plan["stages"] * plan["stage_bytes"] // ROW_BYTES
        self.memory = np.full((size, self.slots, 3), -1, np.int64)
        self.coming = np.zeros((size, self.slots), np.int64)
        self.readers = np.zeros((size, self.slots), np.int64)
        self.hidden = defaultdict(lambda: None)
        self.hidden_readers = defaultdict(int)
        self.hidden_coming = defaultdict(int)
        self.lent = [0] * size
        self.parts = defaultdict(lambda: None)
        self.workers = {(c, r): Worker(e) for (k, c, r), e in launch.roles.items() if k == cluster}
        self.pending: list = []
        self.meeting = defaultdict(set)
        self.tile = defaultdict(int)

    # -- the run --
    def run(self) -> None:
        keys = list(self.workers)
        favour = {key: self.order.random() for key in keys}
        while True:
            ready = [key for key in keys if self._can_step(key)]
            if not ready and not self.pending:
                break
            late = self.policy == "late" and ready
            if self.pending and not late and (not ready or self.order.random() < 0.5):
                self.pending.pop(self.order.randrange(len(self.pending)))()
                continue
            if not ready:
                self.pending.pop(0)()
                continue
            if self.policy == "random":
                key = self.order.choice(ready)
            else:
                key = max(ready, key=favour.get)
                if self.order.random() < 0.01:
                    favour[key] = self.order.random()
            self._step(key)
        stuck = {key: w.events[w.at] for key, w in self.workers.items() if w.at < len(w.events)}
        assert not stuck, f"waiting forever: {stuck}"
        assert (
            not self.coming.any()
            and not self.readers.any()
            and not any(self.hidden_readers.values())
        )
        for barriers in self.barriers:
            assert all(barrier.bytes == 0 for barrier in barriers.values())

    def _can_step(self, key: tuple) -> bool:
        worker = self.workers[key]
        if worker.at == len(worker.events):
            return False
        word, *rest = worker.events[worker.at]
        if word == "wait":
            return self.barriers[key[0]][rest[0]].passed(rest[1])
        return not (word == "meet" and key[1] in self.meeting[key[0]])

    def _step(self, key: tuple) -> None:
        worker = self.workers[key]
        word, *rest = worker.events[worker.at]
        worker.at += 1
        getattr(self, f"_{word}", lambda *_: None)(key[0], key[1], worker, *rest)

    def _later(self, action) -> None:
        self.pending.append(action)

    # -- barriers --
    def _expect(self, cta, role, worker, barrier, bytes_):
        self.barriers[cta][barrier].add(1, bytes_)

    def _arrive(self, cta, role, worker, barrier, ctas):
        for target in [cta] if ctas == 1 else range(ctas):
            self._later(lambda target=target: self.barriers[target][barrier].add(1))

    def _meet(self, cta, role, worker):
        self.meeting[cta].add(role)
        worker.at -= 1
        if len(self.meeting[cta]) == CONSUMERS:
            self.meeting[cta].clear()
            for other in (1, 2):
                self.workers[cta, other].at += 1

    # -- the ring --
    def _load(self, cta, role, worker, operand, stage, offset, column, row, height, parts):
        first = (stage * self.plan["stage_bytes"] + offset) // ROW_BYTES
        where = slice(first, first + height)
        assert offset + height * ROW_BYTES <= self.plan["stage_bytes"]
        content = np.stack(
            [np.full(height, operand), np.full(height, column), row + np.arange(height)], 1
        )
        for target in [cta] if parts == 1 else range(parts):
            assert not self.readers[target, where].any(), "a load into what is being read"
            assert not self.coming[target, where].any(), "two loads into one place"
            assert not self.lent[target], "a load into the parts of q"
            self.coming[target, where] += 1

            def come(target=target):
                self.memory[target, where] = content
                self.coming[target, where] -= 1
                self.barriers[target][FULL + stage].add(0, -height * ROW_BYTES)

            self._later(come)

    def _read(self, cta, worker, stage, offset, operand, column, height, row=None):
        """Reads rows of a tile; their content must be ``operand`` at ``column``, from ``row`` where that is known."""
        first = (stage * self.plan["stage_bytes"] + offset) // ROW_BYTES
        where = slice(first, first + height)
        assert not self.coming[cta, where].any(), "read before it has come"
        found = self.memory[cta, where]
        assert (found[:, 0] == operand).all() and (found[:, 1] == column).all(), (
            operand,
            column,
            found[0],
        )
        row = found[0, 2] if row is None else row
        assert (found[:, 2] == row + np.arange(height)).all(), (row, found[:, 2])
        self.readers[cta, where] += 1
        worker.reading[-1].append(("ring", where))
        return int(row)

    def _read_hidden(self, cta, role, worker, slice_, kind):
        for part in (1, 2) if self.plan["split_columns"] else (role,):
            key = (cta, slice_, part)
            assert not self.hidden_coming[key], "a slice read before it has come"
            assert self.hidden[key] == (self.tile[cta, role], kind, slice_), (
                "the slice of another tile"
            )
            self.hidden_readers[key] += 1
            worker.reading[-1].append(("hidden", key))

    def _drain(self, cta, role, worker, left):
        while len(worker.reading) > left:
            for kind, where in worker.reading.pop(0):
                if kind == "ring":
                    self.readers[cta, where] -= 1
                elif kind == "hidden":
                    self.hidden_readers[where] -= 1

    # -- products --
    def _clear(self, cta, role, worker, name):
        assert not worker.reading
        setattr(worker, name, [])

    def _multiply_down(self, cta, role, worker, stage, k, row, column):
        worker.reading.append([])
        plan = self.plan
        width = plan["rank"] // (2 if plan["split_columns"] else 1)
        x_row = self._read(cta, worker, stage, row * ROW_BYTES, X, k * DEPTH, 64)
        slice_ = 0 if plan["columns"] == 1 else cta
        self._read(
            cta,
            worker,
            stage,
            (plan["rows"] + column) * ROW_BYTES,
            DOWN,
            k * DEPTH,
            width,
            slice_ * plan["rank"] + column,
        )
        worker.hidden.append((k, x_row))

    def _multiply_up(self, cta, role, worker, stage, unit, first, last, column):
        worker.reading.append([])
        width = COLUMNS // (2 if self.plan["split_columns"] else 1)
        rows = set()
        for done in range(0, self.plan["up_rank"], DEPTH):
            offset = (done // DEPTH * COLUMNS + column) * ROW_BYTES
            rows.add(
                self._read(
                    cta, worker, stage, offset, UP, unit * self.plan["up_rank"] + done, width
                )
            )
        needed = range(
            unit * self.plan["up_rank"] // self.plan["rank"],
            ((unit + 1) * self.plan["up_rank"] - 1) // self.plan["rank"] + 1,
        )
        assert (first, last) == (needed[0], needed[-1])
        for slice_ in needed:
            self._read_hidden(cta, role, worker, slice_, 1 if "held" in self.plan else 0)
        (row,) = rows
        worker.out.append((unit, row))

    def _write(self, cta, role, worker, slice_, kind):
        """The slice of H (0), or of q (1) in its place."""
        if kind == 0:
            assert [k for k, _ in worker.hidden] == list(range(self.plan["depth_steps"]))
            assert len({row for _, row in worker.hidden}) == 1
            worker.row = worker.hidden[0][1]
        key = (cta, slice_, role)
        for part in (1, 2):
            assert (
                not self.hidden_readers[cta, slice_, part]
                and not self.hidden_coming[cta, slice_, part]
            )
        self.hidden[key] = (self.tile[cta, role], kind, slice_)

    def _send(self, cta, role, worker, slice_, row, which):
        for target in range(self.plan["columns"]):
            if self.plan["columns"] == 1 or target == cta:
                continue
            for part in (1, 2):
                key = (target, slice_, part)
                assert self.hidden[cta, slice_, part] == (self.tile[cta, role], which, slice_), (
                    "sent before it was whole"
                )
                assert not self.hidden_readers[key] and not self.hidden_coming[key], (
                    "a copy into what is being read"
                )
                self.hidden_coming[key] += 1

            def come(target=target):
                for part in (1, 2):
                    self.hidden[target, slice_, part] = self.hidden[cta, slice_, part]
                    self.hidden_coming[target, slice_, part] -= 1
                self.barriers[target][SLICE + slice_].add(
                    0, -self.plan["rows"] * self.plan["rank"] * 2
                )

            self._later(come)

    def _store(self, cta, role, worker, row, column, width):
        assert not worker.reading
        assert sorted(unit for unit, _ in worker.out) == list(range(self.plan["units"]))
        assert {at for _, at in worker.out} == {column}, "the tile of y and the rows of up differ"
        assert worker.row == row, "the tile of y and the rows of x differ"
        self.written.append((row, column, width))
        barrier = len(worker.events) == worker.at or worker.events[worker.at][0] == "arrive"
        if barrier:
            self.tile[cta, role] += 1

    # -- the feed-forward --
    def _multiply_up1(self, cta, role, worker, stage):
        assert worker.neurons == worker.rounded, "neurons made again before they were rounded"
        # What is written: nobody may touch it until the product is drained.
        worker.reading.append([("neurons", None)])
        rows = {
            self._read(cta, worker, stage, done * NEURONS * 2, UP1, done, NEURONS)
            for done in range(0, self.plan["held"], DEPTH)
        }
        for slice_ in range(self.plan["columns"]):
            self._read_hidden(cta, role, worker, slice_, 0)
        (worker.neurons,) = rows
        worker.activated = None

    def _activate(self, cta, role, worker):
        busy = [kind for product in worker.reading for kind, _ in product]
        assert "neurons" not in busy, "an activation of what is still being made"
        assert worker.activated is None, "an activation twice"
        worker.activated = worker.neurons

    def _round(self, cta, role, worker, first):
        assert not worker.reading, "rounded into the operand of a product that runs"
        assert worker.activated == first
        worker.rounded = first

    def _multiply_down2(self, cta, role, worker, stage):
        worker.reading.append([])
        self._read(cta, worker, stage, 0, DOWN2, worker.rounded, self.plan["held"], 0)
        worker.parts.append(worker.rounded)

    def _send_parts(self, cta, role, worker):
        for target in range(self.plan["columns"]):
            assert not self.coming[target].any() and not self.readers[target].any(), (
                "parts into a ring in use"
            )
            self.lent[target] += 1
            key = (target, cta, role)
            assert self.parts[key] is None
            self.parts[key] = tuple(worker.parts)
        # Ordinary stores are in order with the arrival that follows: they need no time of their own.

    def _add_parts(self, cta, role, worker, slice_):
        found = [self.parts[cta, source, role] for source in range(self.plan["columns"])]
        assert None not in found, "a part that has not come"
        self._all_neurons(found)

    def _keep_parts(self, cta, role, worker):
        self._all_neurons([tuple(worker.parts)])

    def _all_neurons(self, found):
        neurons = sorted(first for part in found for first in part)
        steps = self.plan["neuron_steps"] * self.plan["columns"]
        assert neurons == list(range(0, steps * NEURONS, NEURONS)), "neurons missing or twice"

    def _parts_read(self, cta, role, worker):
        for source in range(self.plan["columns"]):
            self.parts[cta, source, role] = None
            self.lent[cta] -= 1


def simulate(launch: Launch, seed: int, policy: str, rows: int, outer: int) -> None:
    """Run every cluster of a launch in one order and check that y is covered exactly once."""
    order, written = random.Random(seed), []
    for cluster in range(launch.plan["clusters"]):
        Cluster(launch, cluster, order, policy, written).run()
    covered = np.zeros((rows, outer), np.int64)
    for row, column, width in written:
        covered[row : row + 64, column : column + width] += 1
    assert (covered == 1).all()
