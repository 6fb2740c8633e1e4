"""Layers factored one after another: on real modules of every family, in the network compressed so far."""

import copy

import pytest
import torch
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.methods import METHODS
from bert_decomp.models.selection import select_linears
from bert_decomp.planning import MatrixPlan, RankPlan
from bert_decomp.statistics import NEEDS, collect_statistics, token_weights

ANCHORED = sorted(name for name in METHODS if METHODS[name].anchor)
BATCHES = [tiny_batch(30), tiny_batch(17, length=8)]


def logits(model):
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in BATCHES])


def entering(model, name):
    """What enters the module ``name``: real tokens, float64."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, inputs: found.append(inputs[0])
    )
    logits(model)
    handle.remove()
    return torch.cat(
        [x[batch["attention_mask"].bool()] for x, batch in zip(found, BATCHES, strict=True)]
    ).double()


def anchored(model, method, statistics, **size):
    low = copy.deepcopy(model)
    plan = decompose_(
        low,
        DecompositionConfig(method, anchored=True, **size),
        statistics=statistics,
        progress=False,
        batches=BATCHES,
    )
    return low, plan


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_full_rank_keeps_the_logits_and_each_matrix_is_the_best_for_what_enters_it(family):
    model = tiny_model(family)
    modules = select_linears(model)
    statistics = collect_statistics(model, BATCHES, modules, needs=NEEDS, progress=False)
    full = RankPlan(
        {
            name: MatrixPlan(m.in_features, m.out_features, min(m.weight.shape))
            for name, m in modules.items()
        }
    )
    low = copy.deepcopy(model)
    decompose_(
        low,
        DecompositionConfig("coupled", anchored=True),
        statistics=statistics,
        plan=full,
        progress=False,
        batches=BATCHES,
    )
    torch.testing.assert_close(logits(low), logits(model), rtol=1e-3, atol=1e-3)
    low, plan = anchored(model, "whiten", statistics, rank=9)
    for name in list(modules)[::3]:
        linear, layer = modules[name], low.get_submodule(name)
        x, moved = entering(model, name), entering(low, name)
        wanted = x @ linear.weight.double().T
        wanted = wanted if linear.bias is None else wanted + linear.bias.double()

        def loss(down, up, bias, moved=moved, wanted=wanted):
            return float(
                (moved @ down.T.double() @ up.T.double() + bias.double() - wanted)
                .detach()
                .square()
                .sum(1)
                .mean()
            )

        plain = METHODS["whiten"].factor(
            linear.weight, linear.bias, statistics.of(name), plan.matrices[name].rank
        )
        assert loss(layer.down, layer.up, layer.bias) <= loss(*plain) * (1 + 1e-3)


@pytest.mark.parametrize("method", ANCHORED)
def test_answers_come_nearer_to_the_dense_model_on_the_calibration_set(method):
    model = tiny_model("bert")
    statistics = collect_statistics(
        model, BATCHES, select_linears(model), needs=NEEDS, progress=False
    )
    plain = copy.deepcopy(model)
    decompose_(plain, DecompositionConfig(method, rank=9), statistics=statistics, progress=False)
    low, _ = anchored(model, method, statistics, rank=9)
    reference = logits(model)
    assert (logits(low) - reference).square().mean() < (logits(plain) - reference).square().mean()
    assert not any(
        module._forward_pre_hooks or module._forward_hooks
        for module in [*model.modules(), *low.modules()]
    )


def test_token_weights_are_those_of_the_statistics():
    model = tiny_model("bert")
    modules = select_linears(model)
    name = list(modules)[7]
    found = torch.cat(token_weights(model, BATCHES, modules, progress=False)[name]).double()
    gradients = collect_statistics(model, BATCHES, modules, needs=NEEDS, progress=False).gradients[
        name
    ]
    x = entering(model, name)
    torch.testing.assert_close(
        (found[:, None] * x).sum(0) / found.sum(), gradients.input_mean, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.mean(), gradients.second_moment.trace(), rtol=1e-4, atol=1e-9)


def test_what_cannot_be_anchored_is_one_line_and_leaves_the_model_as_it_was():
    for method in sorted(set(METHODS) - set(ANCHORED)):
        with pytest.raises(UserError, match=f"no form for the method {method}.*whiten"):
            DecompositionConfig(method, anchored=True)
    model = tiny_model("bert")
    statistics = collect_statistics(model, BATCHES, select_linears(model), progress=False)
    with pytest.raises(UserError, match="calibration batches"):
        decompose_(
            model,
            DecompositionConfig("whiten", rank=5, anchored=True),
            statistics=statistics,
            progress=False,
        )
    assert set(select_linears(model)) == set(statistics.source)


def test_few_tokens_are_warned_of_with_every_method_that_knows_their_number(caplog):
    model, batches = tiny_model("bert"), [tiny_batch(2)]
    statistics = collect_statistics(
        model, batches, select_linears(model), needs=NEEDS, progress=False
    )
    for method, warned in (("coupled", True), ("kfac", True), ("whiten", True), ("svd", False)):
        caplog.clear()
        decompose_(
            copy.deepcopy(model),
            DecompositionConfig(method, rank=5),
            statistics=statistics,
            progress=False,
        )
        assert ("calibration tokens are few" in caplog.text) is warned
