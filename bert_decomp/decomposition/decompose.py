"""``decompose_``: collect what the method needs, plan the ranks, and swap the layers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ..config import DecompositionConfig
from ..errors import UserError
from ..models.selection import select_linears
from ..planning import RankPlan, read_plan, sensitivity_weights
from ..planning.blocks import BlockPlan
from ..planning.embedding import cuts_embedding
from ..statistics import Statistics, collect_embedding, collect_statistics
from .apply import apply_plan_
from .blocks import check_request, decompose_blocks_
from .search import plan_for_config


def decompose_(
    model: PreTrainedModel,
    config: DecompositionConfig,
    batches: list[dict[str, Tensor]] | None = None,
    *,
    statistics: Statistics | None = None,
    plan: RankPlan | BlockPlan | None = None,
    held_out: list[dict[str, Tensor]] | None = None,
    progress: bool = True,
) -> RankPlan | BlockPlan:
    """Decompose ``model`` in place, and return the plan that was applied.

    Linear layers become low-rank ones; with ``config.units`` other than ``matrices``, heads and neurons become fewer
    and smaller, too.

    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> ids = torch.arange(1, 97).reshape(6, 16)
    >>> batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    >>> plan = decompose_(model, DecompositionConfig(encoder_fraction=0.5), batches, progress=False)
    >>> plan.encoder_fraction <= 0.5
    True
    >>> type(model.bert.encoder.layer[0].intermediate.dense).__name__
    'LowRankLinear'

    Args:
        model: a dense classifier of the BERT family, in any dtype and on any device.
        config: which matrices, how, and to what size.
        batches: the calibration set, dicts of padded tensors with at least ``input_ids`` and ``attention_mask``
            (batch, tokens). A few hundred examples; only the method ``svd`` with uniform ranks does without.
            The refit of units runs over them, too.
        statistics: what an earlier ``collect_statistics`` made of these batches, to collect nothing again.
        plan: ranks to apply; None makes them from ``config``.
        held_out: like ``batches`` with ``labels`` (batch,), on which ``config.max_drop`` is measured.
        progress: show bars.

    Raises:
        UserError: nothing to factor, an impossible size, a plan or statistics of another model, or batches are needed.
            The model is then as it was.
    """
    if plan is None:
        check_request(model, config)
    if plan is None and config.plan_file is not None:
        plan = read_plan(config.plan_file)
    if statistics is None and batches is not None:
        statistics = collect_for(model, config, batches, plan, progress=progress)
    lacking = statistics is not None and statistics.embedding is None
    if statistics is not None and lacking and batches and cuts_embedding(model, config, plan):
        embedding = collect_embedding(model, batches, progress=progress)
        statistics = replace(statistics, embedding=embedding)
    if isinstance(plan, BlockPlan) or (plan is None and config.units != "matrices"):
        return decompose_blocks_(
            model, config, statistics, batches, plan=plan, held_out=held_out, progress=progress
        )
    if plan is None:
        weights = None
        if config.allocation == "sensitivity":
            if batches is None:
                raise UserError("the allocation sensitivity needs the calibration batches")
            weights = sensitivity_weights(model, config, statistics, batches, progress=progress)
        plan = plan_for_config(model, config, statistics, held_out, weights=weights)
    apply_plan_(model, plan, config, statistics, batches, progress=progress)
    return plan


def collect_for(
    model: PreTrainedModel,
    config: DecompositionConfig,
    batches: list[dict[str, Tensor]],
    plan: RankPlan | BlockPlan | None = None,
    *,
    progress: bool = True,
) -> Statistics | None:
    """What ``config`` (with ``plan``, if there is one) needs to know of the data; None if nothing.

    Args:
        batches: the calibration set, as ``decompose_`` takes it.

    Raises:
        UserError: nothing to factor, or the batches hold no token.
    """
    if not config.needs and not cuts_embedding(model, config, plan):
        return None
    modules = select_linears(model, config.include, config.exclude)
    return collect_statistics(model, batches, modules, needs=config.needs, progress=progress)
