"""From a configuration and a model to a ``RankPlan``.

``RankProblem.of`` resolves once what the two mean together: the matrices, their shapes, the method, the ranks allowed
and the budget. Everything else is handed that value and asks neither model nor configuration again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import GOALS, PAPER_FRACTION, DecompositionConfig
from ..errors import UserError
from ..methods import Method, check_width, get_method
from ..models.selection import select_linears
from ..statistics import LayerStatistics, Statistics
from .allocate import (
    Allocate,
    Shapes,
    check_fraction,
    dense_plan,
    fraction_of,
    least_rank,
    shapes_of,
    uniform,
    waterfill,
    within_fraction,
)
from .budgets import budget_for_flops, budget_for_model, encoder_share
from .embedding import (
    WordEmbedding,
    check_embeddings,
    parameters_saved,
    plan_with_embedding,
    planned_embedding,
)
from .nested import nested_plan
from .plan import MatrixPlan, RankPlan
from .plan_file import read_rank_plan

logger = logging.getLogger("bert_decomp")


@dataclass(frozen=True)
class RankProblem:
    """What a configuration asks of one model.

    ``modules`` are the matrices to factor by qualified name, ``shapes`` theirs as (out, in); ``embedding`` is the word
    embedding, if the plan may cut it, and ``share`` what a budget of the whole model leaves of the encoder beside an
    entry of it. Ranks that are chosen from a budget are multiples of ``multiple`` and at least ``least_rank``, which
    everywhere makes ``least_fraction`` of the matrices' weights. ``fraction`` is the share of them to keep: the
    paper's, where a rank, a plan or a search sets the size.
    """

    config: DecompositionConfig
    method: Method
    modules: dict[str, nn.Linear]
    shapes: Shapes
    embedding: WordEmbedding | None
    share: Callable[[MatrixPlan], float]
    multiple: int
    least_rank: int
    least_fraction: float
    fraction: float

    @classmethod
    def of(cls, model: PreTrainedModel, config: DecompositionConfig) -> RankProblem:
        """Resolve ``config`` for ``model``. It needs no weights: a model on ``meta`` will do.

        Raises:
            UserError: nothing to factor, or no plan can have the size.
        """
        modules = select_linears(model, config.include, config.exclude)
        shapes = shapes_of(modules)
        multiple = config.multiple_on(next(model.parameters()).device)
        embedding = planned_embedding(model, config)
        smallest = least_rank(multiple, config.min_rank)
        least = fraction_of(shapes, smallest)
        fraction = PAPER_FRACTION
        if config.encoder_fraction is not None:
            fraction = config.encoder_fraction
        elif config.nested_fractions is not None:
            fraction = config.nested_fractions[0]
            check_fraction(shapes, config.nested_fractions[-1], smallest)
        elif config.model_fraction is not None:
            fraction = budget_for_model(model, shapes, config.model_fraction, least, embedding)
        elif config.flops_fraction is not None:
            fraction = budget_for_flops(
                shapes,
                config.flops_fraction,
                config.flops_seq_length,
                model.config.num_hidden_layers,
                model.config.hidden_size,
                least,
            )
        if config.rank is not None:
            uniform(shapes, config.rank)
        elif all(getattr(config, goal) is None for goal in GOALS) and not (
            embedding is not None and embedding.chosen_by_budget
        ):
            check_fraction(shapes, fraction, smallest)

        def share(entry: MatrixPlan) -> float:
            return encoder_share(
                model, shapes, config.model_fraction or 1.0, parameters_saved(entry)
            )

        return cls(
            config,
            get_method(config.method),
            modules,
            shapes,
            embedding,
            share,
            multiple,
            smallest,
            least,
            fraction,
        )

    def layer_statistics(self, name: str, statistics: Statistics | None) -> LayerStatistics:
        """What the method needs of the layer called ``name``.

        Raises:
            UserError: it was not collected, or of inputs of another width.
        """
        layer = layer_statistics(name, self.config, statistics)
        check_width(self.modules[name], layer)
        return layer

    @torch.no_grad()
    def spectra(self, statistics: Statistics | None) -> dict[str, Tensor]:
        """Singular values of each matrix as the method weighs it, falling, float64, on the CPU."""
        spectra = {}
        for name, linear in self.modules.items():
            layer = self.layer_statistics(name, statistics).to(linear.weight.device)
            spectra[name] = self.method.spectrum(linear.weight, layer).cpu()
        return spectra

    def allocate(
        self, statistics: Statistics | None = None, weights: dict[str, float] | None = None
    ) -> Allocate:
        """The plan for any share of the weights, as the configuration's allocation makes it.

        Raises:
            UserError: the allocation needs statistics or weights.
        """
        embeddings = self._given_embedding(statistics)
        if self.config.allocation == "uniform":
            return lambda fraction: replace(
                within_fraction(self.shapes, fraction, self.multiple, self.config.min_rank),
                embeddings=embeddings,
            )
        if self.config.allocation == "waterfill":
            weights = require(statistics, self.config).energies()
        if weights is None:
            raise UserError(
                "the allocation sensitivity needs measured weights; make them with sensitivity_weights()"
            )
        spectra = self.spectra(statistics)
        groups = self._sharing_input(statistics) if self.config.share_qkv else None
        return lambda fraction: replace(
            waterfill(
                self.shapes,
                spectra,
                weights,
                fraction,
                multiple=self.multiple,
                min_rank=self.config.min_rank,
                groups=groups,
            ),
            embeddings=embeddings,
        )

    def plan(
        self, statistics: Statistics | None = None, weights: dict[str, float] | None = None
    ) -> RankPlan:
        """The plan of the configuration's rank or budget."""
        if self.config.rank is not None:
            plan = uniform(self.shapes, self.config.rank)
            return replace(plan, embeddings=self._given_embedding(statistics))
        allocate = self.allocate(statistics, weights)
        if self.config.nested_fractions is not None:
            plans = {share: allocate(share) for share in self.config.nested_fractions}
            return nested_plan(plans, self.multiple)
        if self.embedding is None or self.config.model_fraction is None:
            return allocate(self.fraction)
        return plan_with_embedding(
            self.embedding,
            statistics,
            self.share,
            self.least_fraction,
            lambda share: allocate(share) if share < 1 else dense_plan(self.shapes),
        )

    def _given_embedding(self, statistics: Statistics | None) -> dict[str, MatrixPlan]:
        return {} if self.embedding is None else self.embedding.given(statistics)

    def _sharing_input(self, statistics: Statistics | None) -> list[list[str]]:
        """Layers of one shape that read the same tensor."""
        source = require(statistics, self.config).source
        groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
        for name, shape in self.shapes.items():
            groups.setdefault((source.get(name, name), shape), []).append(name)
        return [group for group in groups.values() if len(group) > 1]


def plan_ranks(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None = None,
    weights: dict[str, float] | None = None,
) -> RankPlan:
    """The ranks that ``config`` asks for by a rank or a share; each matrix left dense is logged in one line.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> plan = plan_ranks(model, DecompositionConfig("svd", encoder_fraction=0.5))
    >>> {entry.rank for entry in plan.matrices.values()}, round(plan.encoder_fraction, 3)
    ({6}, 0.438)

    Args:
        statistics: with ``config.needs``; only the allocation ``uniform`` does without.
        weights: of each matrix, for the allocation ``sensitivity`` (see ``sensitivity_weights``).

    Raises:
        UserError: an impossible size, or statistics or weights are needed.
    """
    plan = RankProblem.of(model, config).plan(statistics, weights)
    log_dense_layers(plan, config)
    return plan


def log_dense_layers(plan: RankPlan, config: DecompositionConfig) -> None:
    """One line for each matrix that ``plan`` leaves dense."""
    for name, entry in plan.matrices.items():
        if entry.rank is None:
            logger.info(
                "%s: rank %s >= break-even %.0f for %dx%d: layer left dense",
                name,
                config.rank or "of the budget",
                entry.break_even_rank,
                entry.in_features,
                entry.out_features,
            )


def relative_spectra(
    model: PreTrainedModel, config: DecompositionConfig, statistics: Statistics | None = None
) -> dict[str, Tensor]:
    """Singular values, as the method weighs each chosen matrix, relative to the largest (float64, falling)."""
    return {
        name: values / values[0].clamp_min(1e-300)
        for name, values in RankProblem.of(model, config).spectra(statistics).items()
    }


def check_config(model: PreTrainedModel, config: DecompositionConfig) -> None:
    """Raise UserError if no plan can meet ``config``. A model without weights, on ``meta``, will do."""
    RankProblem.of(model, config)
    if config.plan_file is not None:
        check_plan(model, read_rank_plan(config.plan_file))


def check_plan(model: PreTrainedModel, plan: RankPlan) -> None:
    """Raise UserError unless every matrix of ``plan`` is a dense layer of ``model`` that can have that rank."""
    modules = dict(model.named_modules())
    for name, entry in plan.matrices.items():
        linear = modules.get(name)
        shape = entry.in_features, entry.out_features
        if type(linear) is not nn.Linear or (linear.in_features, linear.out_features) != shape:
            raise UserError(
                f"the plan's {name} ({shape[0]}x{shape[1]}) is not a dense layer of this model; make the plan again"
            )
        if entry.rank is not None and entry.rank > min(shape):
            raise UserError(f"the plan gives {name} rank {entry.rank}; full rank is {min(shape)}")
    check_embeddings(model, plan.embeddings)


def require(statistics: Statistics | None, config: DecompositionConfig) -> Statistics:
    """``statistics``, or a UserError that says what is needed."""
    if statistics is None:
        raise UserError(
            f"method {config.method} with allocation {config.allocation} needs statistics "
            f"({', '.join(config.needs)}); give calibration batches, or what collect_statistics makes of them"
        )
    return statistics


def layer_statistics(
    name: str, config: DecompositionConfig, statistics: Statistics | None
) -> LayerStatistics:
    """What the method needs of the layer called ``name``; nothing if it needs nothing.

    Raises:
        UserError: it was not collected.
    """
    needs = get_method(config.method).needs
    return require(statistics, config).of(name, needs) if needs else LayerStatistics(name)
