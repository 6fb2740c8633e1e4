"""The word embedding's place in a plan: a table of tokens by width, cut to a rank or left dense.

A budget of the whole model's parameters counts it, so there it is one more block: with every rank that it is offered
comes a loss, in the unit of the encoder's blocks, and what it leaves of the budget is the encoder's to spend. Both
losses are convex in the rank, so the least sum is where the last parameter buys as much on either side, as in the
auction over the encoder's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..config import DecompositionConfig
from ..errors import UserError
from ..methods import get_method
from ..methods.embedding import FactoredTable
from ..models.embedding import word_embedding
from ..models.selection import is_chosen
from ..statistics import Statistics
from .allocate import least_rank
from .blocks import BlockPlan
from .plan import MatrixPlan, RankPlan

Plan = TypeVar("Plan", RankPlan, BlockPlan)

# Ranks that are tried at a time, between the two beside the best so far.
LADDER = 8


@dataclass(frozen=True)
class WordEmbedding:
    """The dense word embedding ``module`` called ``name``, and its ranks in a plan: the one that was asked for, or
    those that a budget chooses from, rising."""

    name: str
    module: nn.Embedding
    ranks: tuple[int, ...]
    chosen_by_budget: bool

    def entry(self, rank: int | None, loss: float | None = None) -> MatrixPlan:
        """Its entry in a plan."""
        return MatrixPlan(self.module.num_embeddings, self.module.embedding_dim, rank, loss)

    def offers(self, statistics: Statistics | None) -> list[MatrixPlan]:
        """An entry for each of ``ranks`` and, where a budget chooses, one to leave it dense; with what each loses.

        Raises:
            UserError: a budget chooses, and its statistics are missing.
        """
        known = None if statistics is None else statistics.embedding
        if known is None:
            if self.chosen_by_budget:
                raise UserError(
                    "model_fraction counts the word embedding, whose statistics are missing; give calibration "
                    "batches, make them with collect_embedding, or set the size by encoder_fraction"
                )
            return [self.entry(rank) for rank in self.ranks]
        losses = FactoredTable.of(self.module, known).losses.tolist()
        cut = [self.entry(rank, losses[rank]) for rank in self.ranks]
        return [*cut, self.entry(None, 0.0)] if self.chosen_by_budget else cut

    def given(self, statistics: Statistics | None) -> dict[str, MatrixPlan]:
        """Its place in every plan: at the rank that was asked for, if one was."""
        return {} if self.chosen_by_budget else {self.name: self.offers(statistics)[0]}


def counts_embedding(config: DecompositionConfig) -> bool:
    """Whether the budget counts the word embedding and may cut it: one of the whole model's parameters, spent by losses
    that are foreseen as means over tokens, as the embedding's is.

    >>> counts_embedding(DecompositionConfig(model_fraction=0.5))
    True
    """
    # Those methods weigh by the inputs' covariance, the others by something in its place.
    comparable = config.allocation == "waterfill" and get_method(config.method).anchor is not None
    return config.model_fraction is not None and config.embedding_rank is None and comparable


def cuts_embedding(
    model: PreTrainedModel, config: DecompositionConfig, plan: RankPlan | BlockPlan | None
) -> bool:
    """Whether the word embedding's statistics are needed: ``plan`` cuts it or, without one, ``config`` may do so."""
    if plan is None:
        return planned_embedding(model, config) is not None
    return any(entry.rank is not None for entry in plan.embeddings.values())


def planned_embedding(model: PreTrainedModel, config: DecompositionConfig) -> WordEmbedding | None:
    """The word embedding, if a plan that ``config`` asks for cuts it or may do so.

    Raises:
        UserError: a rank is asked for, and there is no word embedding, or the rank is below 1 or reaches break-even.
    """
    rank = config.embedding_rank
    if rank is None and not counts_embedding(config):
        return None
    try:
        name, module = word_embedding(model)
    except UserError:
        if rank is not None:
            raise
        return None
    if rank is None and not is_chosen(name, config.include, config.exclude):
        return None
    shape = module.num_embeddings, module.embedding_dim
    largest = math.ceil(MatrixPlan(*shape, rank).break_even_rank) - 1
    if rank is None:
        multiple = config.multiple_on(module.weight.device)
        choice = range(least_rank(multiple, config.min_rank), largest + 1, multiple)
        ranks = tuple(r for r in choice if parameters_saved(MatrixPlan(*shape, r)) > 0)
        return WordEmbedding(name, module, ranks, True) if ranks else None
    if not 1 <= rank <= largest:
        raise UserError(
            f"embedding_rank {rank} does not compress the word embedding of {shape[0]}x{shape[1]}; give 1 to {largest}"
        )
    return WordEmbedding(name, module, (rank,), False)


def plan_with_embedding(
    embedding: WordEmbedding,
    statistics: Statistics | None,
    share: Callable[[MatrixPlan], float],
    least: float,
    allocate: Callable[[float], Plan],
) -> Plan:
    """The plan of the encoder and the word embedding that is expected to lose least.

    Args:
        share: of the encoder's weights, what the budget leaves beside an entry.
        least: the smallest share that there is a plan for.
        allocate: the encoder's plan for a share; from 1 on everything stays dense.

    Raises:
        UserError: statistics are needed, or every entry leaves too little.
    """
    offers = embedding.offers(statistics)
    losses: dict[int, float] = {}
    plans: dict[int, Plan] = {}
    refusals: list[UserError] = []

    def loss(index: int) -> float:
        if index not in losses:
            left, losses[index] = share(offers[index]), math.inf
            try:
                plan = allocate(left) if left >= least else None
            except UserError as error:
                # Some architectures have blocks that cannot go, so that the smallest plan is larger.
                plan = None
                refusals.append(error)
            if plan is not None:
                plans[index] = replace(plan, embeddings={embedding.name: offers[index]})
                losses[index] = plans[index].expected_loss or 0.0
        return losses[index]

    low: int = 0
    high: int = len(offers) - 1
    step: int = 0
    while step != 1:
        step = max(1, (high - low) // LADDER)
        best = min([*range(low, high, step), high], key=loss)
        low, high = max(low, best - step), min(high, best + step)
    if not plans:
        raise (
            refusals[-1]
            if refusals
            else UserError("the budget leaves too little beside the word embedding; give more")
        )
    return plans[min(plans, key=loss)]


def parameters_saved(entry: MatrixPlan) -> int:
    """Parameters that an embedding's entry saves, the mean of a factored one counted."""
    if entry.rank is None:
        return 0
    return entry.in_features * entry.out_features - entry.weights - entry.out_features


def check_embeddings(model: PreTrainedModel, embeddings: Mapping[str, MatrixPlan]) -> None:
    """Raise UserError unless what a plan says of embeddings is of the dense word embedding of ``model``."""
    for name, entry in embeddings.items():
        own_name, embedding = word_embedding(model)
        shape = entry.in_features, entry.out_features
        if name != own_name or tuple(embedding.weight.shape) != shape:
            raise UserError(
                f"the plan's {name} ({entry.in_features}x{entry.out_features}) is not the word embedding of this "
                "model; make the plan again"
            )
        if entry.rank is not None and entry.rank > min(shape):
            raise UserError(f"the plan gives {name} rank {entry.rank}; full rank is {min(shape)}")
