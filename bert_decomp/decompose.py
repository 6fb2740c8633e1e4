"""``decompose_``: swap every chosen ``nn.Linear`` for a ``LowRankLinear`` with the factors that a method finds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from lowrank_kernels import LowRankLinear
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UserError
from .methods import METHODS, get_method
from .planning import RankPlan, uniform, within_parameters
from .selection import select_linears
from .statistics import InputStatistics, Statistics

logger = logging.getLogger("bert_decomp")


@dataclass
class DecompositionConfig:
    """Which matrices are factored, how, and to what size.

    Raises:
        UserError: the method is unknown, or both a rank and a budget are given.
    """

    method: str = field(default="whiten", metadata={
        "help": "Decomposition: svd (the paper's) or whiten (weighted by what really enters each layer)."})
    rank: int | None = field(default=None, metadata={
        "help": "One rank for every matrix. Without it and --parameters: the share that the paper keeps, 0.4785 of the encoder's weights."})
    parameters: float | None = field(default=None, metadata={
        "help": "Instead of a rank: the share of the encoder's weights to keep, such as 0.25."})
    include: list[str] | None = field(default=None, metadata={
        "help": "Patterns of qualified names; only encoder matrices that match one are factored."})
    exclude: list[str] | None = field(default=None, metadata={
        "help": "Patterns of qualified names; encoder matrices that match one stay dense."})

    def __post_init__(self) -> None:
        get_method(self.method)
        if self.rank is not None and self.parameters is not None:
            raise UserError("--rank and --parameters both set the size; give one")

    @property
    def needs_inputs(self) -> bool:
        """Whether the method must be given input statistics."""
        return METHODS[self.method].needs_inputs


# The share that rank 245 leaves of BERT-base's 72 matrices, the paper's setting.
PAPER_FRACTION = 0.4785


def plan_ranks(model: nn.Module, config: DecompositionConfig) -> RankPlan:
    """The ranks that ``config`` asks for; each matrix left dense is said in one line."""
    modules = select_linears(model, config.include, config.exclude)
    plan = (uniform(modules, config.rank) if config.rank is not None
            else within_parameters(modules, config.parameters if config.parameters is not None else PAPER_FRACTION))
    for name, entry in plan.matrices.items():
        if entry.rank is None:
            logger.info("%s: rank %s >= break-even %.0f for %dx%d: layer left dense", name, config.rank or "of the budget",
                        entry.break_even_rank, entry.in_features, entry.out_features)
    return plan


def _with_statistics(names: list[str], config: DecompositionConfig,
                     statistics: Statistics | None) -> Iterator[tuple[str, InputStatistics | None]]:
    if config.needs_inputs and statistics is None:
        raise UserError(f"the method {config.method} needs statistics; collect them with collect_statistics")
    for name in names:
        yield name, statistics.of(name) if config.needs_inputs else None


def _check_width(name: str, linear: nn.Linear, statistics: InputStatistics | None) -> None:
    if statistics is not None and statistics.mean.shape != (linear.in_features,):
        raise UserError(f"the statistics of {name} are {statistics.mean.shape[0]} wide but the layer reads "
                        f"{linear.in_features}; collect them again for this model")


@torch.no_grad()
def decompose_(model: nn.Module, config: DecompositionConfig, statistics: Statistics | None = None,
               plan: RankPlan | None = None, progress: bool = True) -> RankPlan:
    """Swap the chosen linear layers of ``model`` for low-rank ones, in place, and return the plan that was applied.

    Args:
        statistics: from ``collect_statistics``, for the methods that need them.
        plan: ranks to apply; None makes them from ``config``.

    Raises:
        UserError: nothing to factor, a plan or statistics of another model, or an impossible size.
    """
    plan = plan_ranks(model, config) if plan is None else plan
    modules = dict(model.named_modules())
    method = get_method(config.method)
    factored: dict[str, LowRankLinear] = {}
    chosen = [name for name, entry in plan.matrices.items() if entry.rank is not None]
    for name, inputs in tqdm(_with_statistics(chosen, config, statistics), total=len(chosen), desc=config.method,
                             unit="matrix", disable=not progress, leave=False):
        linear, entry = modules.get(name), plan.matrices[name]
        if type(linear) is not nn.Linear or (linear.in_features, linear.out_features) != (
                entry.in_features, entry.out_features):
            raise UserError(f"the plan's {name} ({entry.in_features}x{entry.out_features}) is not a dense layer of this "
                            "model; make the plan anew")
        if entry.rank > min(entry.in_features, entry.out_features):
            raise UserError(f"the plan gives {name} rank {entry.rank}; full rank is "
                            f"{min(entry.in_features, entry.out_features)}")
        _check_width(name, linear, inputs)
        factored[name] = _factored(linear, method.factor, inputs, entry.rank)
    # Only now is the model touched: an error above leaves it as it was.
    for name, layer in factored.items():
        model.set_submodule(name, layer)
    return plan


def _factored(linear: nn.Linear, factor, inputs: InputStatistics | None, rank: int) -> LowRankLinear:
    bias = None if linear.bias is None else linear.bias.double()
    down, up, bias = factor(linear.weight.double(), bias, _on(inputs, linear.weight.device), rank)
    layer = nn.utils.skip_init(LowRankLinear, linear.in_features, linear.out_features, rank, bias is not None,
                               device=linear.weight.device, dtype=linear.weight.dtype)
    layer.down.copy_(down)
    layer.up.copy_(up)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.train(linear.training)


def _on(inputs: InputStatistics | None, device: torch.device) -> InputStatistics | None:
    if inputs is None:
        return None
    return InputStatistics(inputs.second_moment.to(device), inputs.mean.to(device), inputs.tokens)


@torch.no_grad()
def spectra(model: nn.Module, config: DecompositionConfig, statistics: Statistics | None = None) -> dict[str, Tensor]:
    """Singular values, as the method weighs each chosen matrix, relative to the largest (float64, falling)."""
    modules = select_linears(model, config.include, config.exclude)
    method, out = get_method(config.method), {}
    for name, inputs in _with_statistics(list(modules), config, statistics):
        weight = modules[name].weight.double()
        values = method.spectrum(weight, _on(inputs, weight.device)).cpu()
        out[name] = values / values[0].clamp_min(1e-300)
    return out
