"""Budgets from what a user wants: a size of the whole model, FLOPs, a latency, or a quality.

Each ends in a share of the encoder matrices' weights, which an allocation then spreads. Latency is not modelled: a
table of the operators is measured on this machine at the user's batch and length, and the result is measured again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from .allocate import Shapes, rounded_up
from .plan import MatrixPlan, RankPlan

logger = logging.getLogger("bert_decomp")

Allocate = Callable[[float], RankPlan]


def _weights(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


def budget_for_whole(
    model: nn.Module, shapes: Shapes, fraction: float, least: float, saved: int = 0
) -> float:
    """The encoder share at which the whole model keeps ``fraction`` of its parameters.

    Args:
        least: the smallest encoder share that there is a plan for, above 0.
        saved: parameters that a factored embedding saves.

    Raises:
        UserError: the parts that stay dense and ``least`` weigh more, or the rest meets it without a cut.
    """
    whole, encoder = sum(p.numel() for p in model.parameters()), _weights(shapes)
    budget = (fraction * whole - (whole - encoder - saved)) / encoder
    if budget < least:
        raise UserError(
            f"{fraction:.4g} of the whole model is below what its dense parts and the least ranks weigh; the "
            f"smallest is {rounded_up(1 - (encoder + saved - least * encoder) / whole)}"
        )
    if saved and budget >= 1:
        raise UserError(
            f"the factored embedding alone leaves {1 - saved / whole:.4f} of the whole model; give less than that"
        )
    return budget


def budget_for_flops(
    shapes: Shapes, fraction: float, length: int, layers: int, width: int, least: float
) -> float:
    """The encoder share at which a sentence of ``length`` tokens costs ``fraction`` of the dense encoder's FLOPs.

    Attention scores and contexts, 4 length width FLOPs a token and layer, cannot be factored. ``least`` is the smallest
    encoder share that there is a plan for, above 0.

    Raises:
        UserError: attention and ``least`` cost more.
    """
    linear, attention = 2 * _weights(shapes), 4 * length * width * layers
    budget = (fraction * (linear + attention) - attention) / linear
    if budget < least:
        raise UserError(
            f"{fraction:.4g} of the FLOPs is below what attention and the least ranks cost at length {length}; "
            f"the smallest is {rounded_up((attention + least * linear) / (linear + attention))}"
        )
    return budget


@torch.inference_mode()
def seconds_of(call: Callable[[], object], cuda: bool, seconds: float = 0.1) -> float:
    """Seconds of ``call``, the device's work included, over about ``seconds``: the 0.2 quantile, because what else runs on
    a machine only adds time."""
    times: list[float] = []
    call()
    while sum(times) < seconds or len(times) < 5:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 5]


@dataclass
class OperatorTable:
    """Measured seconds of one linear layer on ``rows`` tokens, by (in, out, rank); rank 0 is the dense layer.

    Ranks between measured ones are interpolated; every shape is measured at a few ranks when it is first asked for.
    """

    rows: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    seconds: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)

    def _measure(self, in_features: int, out_features: int, rank: int) -> float:
        layer = (
            nn.Linear(in_features, out_features)
            if rank == 0
            else LowRankLinear(in_features, out_features, rank)
        )
        layer = layer.to(self.device, self.dtype)
        x = torch.randn(self.rows, in_features, device=self.device, dtype=self.dtype)
        return seconds_of(lambda: layer(x), self.device.type == "cuda")

    def of(self, entry: MatrixPlan) -> float:
        """Seconds of one matrix of a plan."""
        shape = entry.in_features, entry.out_features
        if shape not in self.seconds:
            top = int(entry.break_even_rank)
            self.seconds[shape] = {
                rank: self._measure(*shape, rank)
                for rank in sorted({0, 1, *(max(1, top * part // 8) for part in range(1, 9))})
            }
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


def _bisect(
    allocate: Allocate, accept: Callable[[RankPlan], bool], low: float, high: float, steps: int = 30
) -> float:
    """The largest share in low..high whose plan is accepted, if shares are accepted from below; ``low`` if none is."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if accept(allocate(middle)) else (low, middle)
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
        allocate: a plan for a share of the weights.
        smallest: the least share that ``allocate`` can make a plan for.
        table: of the operators at the user's batch and length.
        latency: seconds of the model with a plan applied, measured; None is the dense model.

    The time outside the matrices is the dense model's latency less its operators'. What a plan really takes corrects that
    figure; what was too slow and too fast so far bounds the search, which halves what is left where the table is of no more
    help. A plan is taken when two measurements of it are near enough.

    Raises:
        UserError: the dense model is faster already, or not even the smallest plan is as fast. A plan further away than
            ``tolerance``, where ranks come in large steps or the machine is busy, is returned with a warning.
    """
    dense = RankPlan(
        {name: MatrixPlan(columns, rows, None) for name, (rows, columns) in shapes.items()}
    )
    before = latency(None)
    if target >= before:
        raise UserError(
            f"the target of {target * 1e3:.3g} ms is no less than what the dense model takes, "
            f"{before * 1e3:.3g} ms; give less"
        )
    outside = before - table.total(dense)
    low, high = smallest, 1 - 1e-6
    found: list[tuple[RankPlan, float]] = []
    for _ in range(rounds):
        room = target - outside
        fraction = _bisect(
            allocate, lambda plan, room=room: table.total(plan) <= room, smallest, 1 - 1e-6
        )
        plan = allocate(fraction if low < fraction < high else (fraction := (low + high) / 2))
        if any(plan.matrices == known.matrices for known, _ in found):
            plan = allocate(fraction := (low + high) / 2)
            if any(plan.matrices == known.matrices for known, _ in found):
                break
        measured = latency(plan)
        if abs(measured - target) <= tolerance * target / 2:
            measured = (measured + latency(plan)) / 2
        found.append((plan, measured))
        if abs(measured - target) <= tolerance * target / 2:
            break
        low, high = (max(low, fraction), high) if measured < target else (low, min(high, fraction))
        outside = measured - table.total(plan)
    best, measured = min(found, key=lambda item: abs(item[1] - target))
    if measured > (1 + tolerance) * target and (floor := latency(allocate(smallest))) > target:
        raise UserError(
            f"no plan takes {target * 1e3:.3g} ms; the smallest takes {floor * 1e3:.3g} ms and the nearest "
            f"found {measured * 1e3:.3g} ms"
        )
    if abs(measured - target) > tolerance * target:
        logger.warning(
            "the nearest plan found to %.3g ms takes %.3g ms", target * 1e3, measured * 1e3
        )
    return best


def for_quality(
    points: float,
    reference: float,
    allocate: Allocate,
    smallest: float,
    metric: Callable[[RankPlan], float],
    *,
    step: float = 0.02,
) -> RankPlan:
    """The smallest plan whose metric stays within ``points`` of ``reference`` (both shares of 1), by bisection.

    Args:
        metric: of the model with a plan applied, on a validation split; called about log2(1 / step) times.
        step: shares of the weights are told apart to this.

    Raises:
        UserError: not even the largest plan that compresses anything is good enough.
    """
    low, high = smallest, 0.98
    best = allocate(high)
    found = metric(best)
    if found < reference - points:
        raise UserError(
            f"no plan stays within {points:.4g} of {reference:.4g}; keeping {high:.0%} of the weights gives "
            f"{found:.4f}, so allow at least {reference - found:.4f}"
        )
    while high - low > step:
        middle = (low + high) / 2
        plan = allocate(middle)
        if metric(plan) >= reference - points:
            best, high = plan, middle
        else:
            low = middle
    return best
