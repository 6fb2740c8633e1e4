"""``decompose_``: swap every chosen ``nn.Linear`` for a ``LowRankLinear`` with the factors that a method finds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_kernels import LowRankLinear

from ..config import GOALS, PAPER_FRACTION, DecompositionConfig
from ..errors import UserError
from ..methods import Drift, Method, get_method
from ..models.selection import select_linears
from ..planning import (
    MatrixPlan,
    RankPlan,
    budget_for_flops,
    budget_for_whole,
    fraction_of,
    least_rank,
    measure_sensitivity,
    read_plan,
    shapes_of,
    uniform,
    waterfill,
    within_parameters,
)
from ..statistics import LayerStatistics, Statistics, fingerprint
from .anchored import anchored_layers
from .embedding import check_embeddings, factor_embedding, saved_by, with_embedding, word_embedding

logger = logging.getLogger("bert_decomp")


# Fewer tokens than this many times a layer's width make its covariance a guess.
TOKENS_PER_FEATURE = 2


def _budget(
    model: nn.Module, shapes: dict[str, tuple[int, int]], config: DecompositionConfig
) -> float:
    """The share of the matrices' weights that ``config`` asks for."""
    least = least_fraction(model, shapes, config)
    if config.model_fraction is not None:
        return budget_for_whole(
            model, shapes, config.model_fraction, least, saved_by(model, config.embedding_rank)
        )
    if config.flops_fraction is not None:
        return budget_for_flops(
            shapes,
            config.flops_fraction,
            config.flops_seq_length,
            model.config.num_hidden_layers,
            model.config.hidden_size,
            least,
        )
    return PAPER_FRACTION if config.encoder_fraction is None else config.encoder_fraction


def _multiple(model: nn.Module, config: DecompositionConfig) -> int:
    return config.multiple_on(next(model.parameters()).device)


def least_fraction(
    model: nn.Module, shapes: dict[str, tuple[int, int]], config: DecompositionConfig
) -> float:
    """The smallest share of the matrices' weights that ``config`` has a plan for: its least rank everywhere."""
    return fraction_of(shapes, least_rank(_multiple(model, config), config.min_rank))


def check_size(model: nn.Module, config: DecompositionConfig) -> None:
    """Raise UserError if no plan can meet ``config``; needs no statistics, nor weights (a model on ``meta`` will do)."""
    shapes = shapes_of(select_linears(model, config.include, config.exclude))
    saved_by(model, config.embedding_rank)
    if config.rank is not None:
        uniform(shapes, config.rank)
    elif config.plan_file is not None:
        check_plan(model, read_plan(config.plan_file))
    elif all(getattr(config, goal) is None for goal in GOALS):
        within_parameters(
            shapes, _budget(model, shapes, config), _multiple(model, config), config.min_rank
        )


def plan_ranks(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None = None,
    weights: dict[str, float] | None = None,
    say: bool = True,
) -> RankPlan:
    """The ranks that ``config`` asks for; each matrix left dense is said in one line.

    Args:
        statistics: with ``config.needs``; only the allocation ``uniform`` does without.
        weights: of each matrix, for the allocation ``sensitivity`` (see ``sensitivity``).
        say: say it.

    Raises:
        UserError: an impossible size, or statistics or weights are needed.
    """
    modules = select_linears(model, config.include, config.exclude)
    shapes = shapes_of(modules)
    if config.rank is not None:
        plan = uniform(shapes, config.rank)
    elif config.allocation == "uniform":
        plan = within_parameters(
            shapes, _budget(model, shapes, config), _multiple(model, config), config.min_rank
        )
    else:
        check_size(model, config)
        if config.allocation == "sensitivity" and weights is None:
            raise UserError(
                "the allocation sensitivity needs measured weights; make them with sensitivity()"
            )
        if config.allocation == "waterfill":
            weights = _require(statistics, config).energies()
        plan = waterfill(
            shapes,
            _spectra(modules, config, statistics),
            weights,
            _budget(model, shapes, config),
            multiple=_multiple(model, config),
            min_rank=config.min_rank,
            groups=_shared(shapes, statistics) if config.share_qkv else None,
        )
    if say:
        say_dense(plan, config)
    return with_embedding(plan, model, config.embedding_rank)


def say_dense(plan: RankPlan, config: DecompositionConfig) -> None:
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


def _shared(shapes: dict[str, tuple[int, int]], statistics: Statistics | None) -> list[list[str]]:
    """Layers of one shape that read the same tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((statistics.source.get(name, name), shape), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def sensitivity(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None,
    batches: list[dict[str, Tensor]],
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Measured weights for the allocation ``sensitivity``: each matrix alone is cut to the budget's uniform rank.

    Args:
        batches: padded inputs on which answers are compared, a few hundred examples.
        cache: a JSON file from which an interrupted measurement goes on; made anew for another model, data or method.
    """
    modules = select_linears(model, config.include, config.exclude)
    shapes = shapes_of(modules)
    base = within_parameters(shapes, _budget(model, shapes, config))
    ranks = {
        name: entry.rank or int(entry.break_even_rank) for name, entry in base.matrices.items()
    }

    def cut(name: str, rank: int) -> nn.Module:
        return _factored(
            modules[name], get_method(config.method), _layer(statistics, name, config), rank
        )

    return measure_sensitivity(
        model,
        batches,
        _spectra(modules, config, statistics),
        ranks,
        cut,
        cache=cache,
        key=f"{fingerprint(model, batches)}-{config.method}",
        progress=progress,
    )


def _require(statistics: Statistics | None, config: DecompositionConfig) -> Statistics:
    if statistics is None:
        raise UserError(
            f"method {config.method} with allocation {config.allocation} needs statistics "
            f"({', '.join(config.needs)}); collect them with collect_statistics"
        )
    return statistics


def _layer(
    statistics: Statistics | None, name: str, config: DecompositionConfig
) -> LayerStatistics:
    """What the method needs of one layer."""
    needs = get_method(config.method).needs
    return _require(statistics, config).of(name, needs) if needs else LayerStatistics(name)


def _check_width(linear: nn.Linear, layer: LayerStatistics) -> None:
    if layer.width not in (None, linear.in_features):
        raise UserError(
            f"the statistics of {layer.name} are {layer.width} wide but the layer reads {linear.in_features}; "
            "collect them again for this model"
        )


def _warn_of_few_tokens(
    modules: dict[str, nn.Linear],
    names: list[str],
    config: DecompositionConfig,
    statistics: Statistics | None,
) -> None:
    tokens = {name: _layer(statistics, name, config).tokens for name in names}
    few = [
        name
        for name in names
        if tokens[name] is not None
        and tokens[name] < TOKENS_PER_FEATURE * modules[name].in_features
    ]
    if few:
        widest = max(modules[name].in_features for name in few)
        logger.warning(
            "%d calibration tokens are few for inputs %d wide (give %d or more); covariances are shrunk",
            tokens[few[0]],
            widest,
            TOKENS_PER_FEATURE * widest,
        )


@torch.no_grad()
def decompose_(
    model: nn.Module,
    config: DecompositionConfig,
    statistics: Statistics | None = None,
    plan: RankPlan | None = None,
    progress: bool = True,
    batches: list[dict[str, Tensor]] | None = None,
) -> RankPlan:
    """Swap the chosen linear layers of ``model`` for low-rank ones, in place, and return the plan that was applied.

    Args:
        statistics: from ``collect_statistics``, for the methods that need them.
        plan: ranks to apply; None makes them from ``config``.
        batches: the padded batches that the statistics were collected from, for ``config.anchored``.

    Raises:
        UserError: nothing to factor, a plan or statistics of another model, an impossible size, or no batches to anchor on.
    """
    plan = plan_ranks(model, config, statistics) if plan is None else plan
    modules, method = dict(model.named_modules()), get_method(config.method)
    factored: dict[str, LowRankLinear] = {}
    chosen = [name for name, entry in plan.matrices.items() if entry.rank is not None]
    check_plan(model, plan)
    if method.needs:
        _require(statistics, config)
        _warn_of_few_tokens(modules, chosen, config, statistics)
    if config.anchored:
        if batches is None:
            raise UserError(
                "anchored factors need the calibration batches; give decompose_ the batches of the statistics"
            )

        def factor(name: str, layer: LayerStatistics, drift: Drift) -> LowRankLinear:
            return _factored(modules[name], method, layer, plan.matrices[name].rank, drift)

        factored = anchored_layers(
            model, chosen, method, statistics, batches, factor, progress=progress
        )
    else:
        for name in tqdm(
            chosen, desc=config.method, unit="matrix", disable=not progress, leave=False
        ):
            factored[name] = _factored(
                modules[name], method, _layer(statistics, name, config), plan.matrices[name].rank
            )
    for name, entry in plan.embeddings.items():
        if entry.rank is not None:
            if statistics is None or statistics.embedding is None:
                raise UserError(
                    "factoring the word embedding needs its statistics; make them with collect_embedding"
                )
            factored[name] = factor_embedding(
                word_embedding(model)[1], statistics.embedding, entry.rank
            )
    # Only now is the model touched: an error above leaves it as it was.
    for name, layer in factored.items():
        model.set_submodule(name, layer)
    return plan


def check_plan(model: nn.Module, plan: RankPlan) -> None:
    """Raise UserError unless every matrix of ``plan`` is a dense layer of ``model`` that can have that rank."""
    modules = dict(model.named_modules())
    for name, entry in plan.matrices.items():
        _check_entry(name, modules.get(name), entry)
    check_embeddings(model, plan)


def _check_entry(name: str, linear: nn.Module | None, entry: MatrixPlan) -> None:
    if type(linear) is not nn.Linear or (linear.in_features, linear.out_features) != (
        entry.in_features,
        entry.out_features,
    ):
        raise UserError(
            f"the plan's {name} ({entry.in_features}x{entry.out_features}) is not a dense layer of this "
            "model; make the plan anew"
        )
    if entry.rank is not None and entry.rank > min(entry.in_features, entry.out_features):
        raise UserError(
            f"the plan gives {name} rank {entry.rank}; full rank is "
            f"{min(entry.in_features, entry.out_features)}"
        )


@torch.no_grad()
def _factored(
    linear: nn.Linear,
    method: Method,
    statistics: LayerStatistics,
    rank: int,
    drift: Drift | None = None,
) -> LowRankLinear:
    _check_width(linear, statistics)
    device = linear.weight.device
    if drift is not None:
        drift = Drift(drift.difference.to(device), drift.mean.to(device))
    down, up, bias = method.factor(linear.weight, linear.bias, statistics.to(device), rank, drift)
    layer = nn.utils.skip_init(
        LowRankLinear,
        linear.in_features,
        linear.out_features,
        rank,
        bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.down.copy_(down)
    layer.up.copy_(up)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.train(linear.training)


@torch.no_grad()
def _spectra(
    modules: dict[str, nn.Linear], config: DecompositionConfig, statistics: Statistics | None
) -> dict[str, Tensor]:
    """Singular values of each matrix as the method weighs it, falling, float64, on the CPU."""
    method, out = get_method(config.method), {}
    for name, linear in modules.items():
        layer = _layer(statistics, name, config)
        _check_width(linear, layer)
        out[name] = method.spectrum(linear.weight, layer.to(linear.weight.device)).cpu()
    return out


def spectra(
    model: nn.Module, config: DecompositionConfig, statistics: Statistics | None = None
) -> dict[str, Tensor]:
    """Singular values, as the method weighs each chosen matrix, relative to the largest (float64, falling)."""
    modules = select_linears(model, config.include, config.exclude)
    return {
        name: values / values[0].clamp_min(1e-300)
        for name, values in _spectra(modules, config, statistics).items()
    }
