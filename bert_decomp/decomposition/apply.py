"""Applying a plan: each chosen layer is swapped for the factors that the method finds, all of them or none."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import DecompositionConfig
from ..errors import UserError
from ..methods import Drift, factored_linear, get_method
from ..methods.embedding import FactoredTable
from ..models.embedding import word_embedding
from ..models.nested import NestedLinear
from ..models.saving import mark_low_rank
from ..planning import MatrixPlan, RankPlan, check_plan, layer_statistics, require
from ..statistics import LayerStatistics, Statistics
from .anchored import anchored_layers

logger = logging.getLogger("bert_decomp")

# Fewer tokens than this many times a layer's width make its covariance a guess.
TOKENS_PER_FEATURE = 2


@torch.no_grad()
def apply_plan_(
    model: PreTrainedModel,
    plan: RankPlan,
    config: DecompositionConfig,
    statistics: Statistics | None = None,
    batches: list[dict[str, Tensor]] | None = None,
    *,
    progress: bool = True,
) -> None:
    """Swap the layers of ``model`` that ``plan`` cuts for low-rank ones, in place. An error leaves the model as it was.

    Args:
        statistics: what the method needs, and of the word embedding if the plan cuts it.
        batches: the padded batches that the statistics are of, for ``config.anchored``.

    Raises:
        UserError: a plan or statistics of another model, or statistics or batches are needed.
    """
    check_plan(model, plan)
    method = get_method(config.method)
    ranks = {name: entry.rank for name, entry in plan.matrices.items() if entry.rank is not None}
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in ranks}
    if method.needs:
        _warn_of_few_tokens(linears, require(statistics, config))
    layers: dict[str, nn.Module] = {}
    if config.anchored:
        if plan.fractions:
            raise UserError("anchored fits the factors to one size, and the plan has several")
        if batches is None:
            raise UserError(
                "anchored factors need the calibration batches; give decompose_ the batches of the statistics"
            )

        def factor(name: str, layer: LayerStatistics, drift: Drift) -> nn.Module:
            return factored_linear(linears[name], method, layer, ranks[name], drift)

        layers = anchored_layers(
            model,
            list(linears),
            method,
            require(statistics, config),
            batches,
            factor,
            progress=progress,
        )
    else:
        for name in tqdm(
            linears, desc=config.method, unit="matrix", disable=not progress, leave=False
        ):
            known = layer_statistics(name, config, statistics)
            sizes = [
                factored_linear(linears[name], method, known, rank)
                for rank in (ranks[name], *plan.matrices[name].smaller_ranks)
            ]
            layers[name] = (
                NestedLinear.of(dict(zip(plan.fractions, sizes, strict=True)))
                if plan.fractions
                else sizes[0]
            )
    layers.update(factored_embeddings(model, plan.embeddings, statistics))
    for name, module in layers.items():
        model.set_submodule(name, module)
    mark_low_rank(model)


def factored_embeddings(
    model: PreTrainedModel, embeddings: dict[str, MatrixPlan], statistics: Statistics | None
) -> dict[str, nn.Module]:
    """By qualified name, what takes the place of the word embedding, if a plan cuts it.

    Raises:
        UserError: its statistics are missing, or of another model.
    """
    layers: dict[str, nn.Module] = {}
    for name, entry in embeddings.items():
        if entry.rank is not None:
            if statistics is None or statistics.embedding is None:
                raise UserError(
                    "factoring the word embedding needs its statistics; make them with collect_embedding"
                )
            _, embedding = word_embedding(model)
            layers[name] = FactoredTable.of(embedding, statistics.embedding).layer(entry.rank)
    return layers


def _warn_of_few_tokens(linears: dict[str, nn.Linear], statistics: Statistics) -> None:
    few: list[tuple[int, int]] = []
    for name, linear in linears.items():
        tokens = statistics.of(name, ()).tokens
        if tokens is not None and tokens < TOKENS_PER_FEATURE * linear.in_features:
            few.append((tokens, linear.in_features))
    if few:
        widest = max(width for _, width in few)
        logger.warning(
            "%d calibration tokens are few for inputs %d wide (give %d or more); covariances are shrunk",
            few[0][0],
            widest,
            TOKENS_PER_FEATURE * widest,
        )
