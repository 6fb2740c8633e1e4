"""The plan that meets a latency, by a table of the operators' times and by measuring the whole model.

Latency is not modelled: a table of the operators is measured on this machine at the user's batch and length, and the
result is measured again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear
from lowrank_kernels.measure import milliseconds

from ..errors import UserError
from .allocate import Allocate, Shapes, dense_plan
from .plan import MatrixPlan, RankPlan

logger = logging.getLogger("bert_decomp")

# The largest share of the weights that is still a cut.
LARGEST_FRACTION = 1 - 1e-6

# Makes a call of a module on its inputs, in some engine (see ``engines``).
Prepare = Callable[[nn.Module, tuple[Tensor, ...]], Callable[[], object]]


def eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call of ``module`` in torch."""
    return partial(module, *inputs)


def time_part(prepare: Prepare, module: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of a module on its inputs in the engine of ``prepare``: the 0.2 quantile, because what else runs on
    a machine only adds time."""
    call = prepare(module, inputs)
    return milliseconds(lambda _: call(), inputs[:1])[0]


@dataclass
class OperatorTable:
    """Measured seconds of one linear layer on ``rows`` tokens, by (in, out) and rank; rank 0 is the dense layer.

    Ranks between measured ones are interpolated; every shape is measured at a few ranks when it is first asked for,
    in the engine of ``prepare``.
    """

    rows: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    seconds: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    prepare: Prepare = eager

    @torch.inference_mode()
    def _measure(self, in_features: int, out_features: int, rank: int) -> float:
        layer = (
            nn.Linear(in_features, out_features)
            if rank == 0
            else LowRankLinear(in_features, out_features, rank)
        )
        layer = layer.to(self.device, self.dtype)
        x = torch.randn(self.rows, in_features, device=self.device, dtype=self.dtype)
        return time_part(self.prepare, layer, x) / 1e3

    def of(self, entry: MatrixPlan) -> float:
        """Seconds of one matrix of a plan."""
        shape = entry.in_features, entry.out_features
        if shape not in self.seconds:
            top = int(entry.break_even_rank)
            ranks = {0, 1, *(max(1, top * part // 8) for part in range(1, 9))}
            self.seconds[shape] = {rank: self._measure(*shape, rank) for rank in sorted(ranks)}
        known = self.seconds[shape]
        if entry.rank is None:
            return known[0]
        below = max(rank for rank in known if 0 < rank <= max(entry.rank, 1))
        above = min((rank for rank in known if rank >= entry.rank), default=below)
        if above == below:
            return known[below]
        share = (entry.rank - below) / (above - below)
        return (1 - share) * known[below] + share * known[above]

    def total(self, plan: RankPlan) -> float:
        """Seconds of all matrices of a plan."""
        return sum(self.of(entry) for entry in plan.matrices.values())


def _largest_share(
    allocate: Allocate, table: OperatorTable, seconds: float, low: float, steps: int = 30
) -> float:
    """The largest share from ``low`` on whose matrices take at most ``seconds`` by the table; ``low`` if none does."""
    high = LARGEST_FRACTION
    for _ in range(steps):
        middle = (low + high) / 2
        if table.total(allocate(middle)) <= seconds:
            low = middle
        else:
            high = middle
    return low


def for_latency(
    target: float,
    shapes: Shapes,
    allocate: Allocate,
    smallest: float,
    table: OperatorTable,
    latency: Callable[[RankPlan | None], float],
    *,
    tolerance: float = 0.05,
    rounds: int = 8,
) -> RankPlan:
    """The largest plan whose measured latency is ``target`` seconds, within ``tolerance``.

    Args:
        shapes: (out, in) of each matrix that is factored.
        allocate: a plan for a share of the weights.
        smallest: the least share that ``allocate`` can make a plan for.
        table: of the operators at the user's batch and length.
        latency: seconds of the model with a plan applied, measured; None is the dense model.

    The time outside the matrices is the dense model's latency less its operators'. What a plan really takes corrects
    that figure; what was too slow and too fast so far bounds the search, which halves what is left where the table is
    of no more help. A plan is taken when two measurements of it are near enough.

    Raises:
        UserError: the dense model is faster already, or not even the smallest plan is as fast. A plan further away than
            ``tolerance``, where ranks come in large steps or the machine is busy, is returned with a warning.
    """
    dense = dense_plan(shapes)
    before = latency(None)
    if target >= before:
        raise UserError(
            f"the target of {target * 1e3:.3g} ms is no less than what the dense model takes, "
            f"{before * 1e3:.3g} ms; give less"
        )
    outside = before - table.total(dense)
    low, high = smallest, LARGEST_FRACTION
    tried: list[tuple[RankPlan, float]] = []

    def was_tried(plan: RankPlan) -> bool:
        return any(plan.matrices == known.matrices for known, _ in tried)

    for _ in range(rounds):
        fraction = _largest_share(allocate, table, target - outside, smallest)
        if not low < fraction < high:
            fraction = (low + high) / 2
        plan = allocate(fraction)
        if was_tried(plan):
            fraction = (low + high) / 2
            plan = allocate(fraction)
            if was_tried(plan):
                break
        measured = latency(plan)
        if abs(measured - target) <= tolerance * target / 2:
            measured = (measured + latency(plan)) / 2
        tried.append((plan, measured))
        if abs(measured - target) <= tolerance * target / 2:
            break
        if measured < target:
            low = max(low, fraction)
        else:
            high = min(high, fraction)
        outside = measured - table.total(plan)
    best, measured = min(tried, key=lambda item: abs(item[1] - target))
    if measured > (1 + tolerance) * target:
        fastest = latency(allocate(smallest))
        if fastest > target:
            raise UserError(
                f"no plan takes {target * 1e3:.3g} ms; the smallest takes {fastest * 1e3:.3g} ms and the nearest "
                f"found {measured * 1e3:.3g} ms"
            )
    if abs(measured - target) > tolerance * target:
        logger.warning(
            "the nearest plan found to %.3g ms takes %.3g ms", target * 1e3, measured * 1e3
        )
    return best
