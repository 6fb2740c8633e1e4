"""Selection, statistics, plans and the swap, on small encoders of every family."""

import contextlib
import copy
import logging

import pytest
import torch
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from torch import nn

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.methods import METHODS
from bert_decomp.models.selection import select_linears
from bert_decomp.planning import (
    MatrixPlan,
    RankPlan,
    relative_spectra,
    shapes_of,
    uniform,
    within_fraction,
)
from bert_decomp.statistics import NEEDS, Statistics, collect_statistics
from lowrank_kernels import LowRankLinear

FAMILIES = sorted(FAMILY_SIZES)
MATRICES = {"modernbert": 4}


def statistics_of(model, batches=None, needs=("inputs",), **options):
    return collect_statistics(
        model,
        batches or [tiny_batch()],
        select_linears(model),
        needs=needs,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_takes_the_matrices_of_every_layer_and_nothing_else(family):
    model = tiny_model(family)
    names = select_linears(model)
    assert len(names) == 3 * MATRICES.get(family, 6)
    assert not any(
        word in name for name in names for word in ("embeddings", "pooler", "classifier", "head")
    )


def test_selection_by_patterns():
    model = tiny_model("bert")
    assert len(select_linears(model, include=["*.attention.self.*"])) == 9
    assert len(select_linears(model, exclude=["*.layer.0.*", "*.output.dense"])) == 2 * 4
    for bad in ({"include": ["*.nothing"]}, {"exclude": ["*"]}):
        with pytest.raises(UserError):
            select_linears(model, **bad)
    with pytest.raises(UserError, match="no linear layers"):
        select_linears(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_a_direct_float64_computation(family):
    model, batch = tiny_model(family), tiny_batch()
    seen = {}
    modules = select_linears(model)
    handles = [
        module.register_forward_pre_hook(
            lambda _m, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    statistics = statistics_of(model, [batch])
    keep = batch["attention_mask"].bool()
    for name in modules:
        x = seen[name][keep].double()
        torch.testing.assert_close(
            statistics.of(name).inputs.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(statistics.of(name).inputs.mean, x.mean(0), rtol=1e-5, atol=1e-6)


def test_padding_and_the_cut_into_batches_change_no_statistics():
    model, batch = tiny_model("bert"), tiny_batch()
    whole = statistics_of(model, [batch])
    wider = {
        name: torch.nn.functional.pad(value, (0, 6), value=9 if name == "input_ids" else 0)
        if value.ndim == 2
        else value
        for name, value in batch.items()
    }
    single = [
        {
            name: value[i : i + 1, : int(batch["attention_mask"][i].sum())]
            if value.ndim == 2
            else value[i : i + 1]
            for name, value in batch.items()
        }
        for i in range(5)
    ]
    for other in (statistics_of(model, [wider]), statistics_of(model, single)):
        for name, entry in whole.inputs.items():
            torch.testing.assert_close(
                other.inputs[name].second_moment, entry.second_moment, rtol=1e-4, atol=1e-5
            )


def test_layers_that_read_one_tensor_share_its_statistics_and_files_round_trip(tmp_path):
    statistics = statistics_of(tiny_model("bert"))
    assert len(statistics.inputs) == 3 * 4 and len(statistics.source) == 3 * 6
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.source == statistics.source and loaded.fingerprint == statistics.fingerprint
    for name, entry in statistics.inputs.items():
        assert torch.equal(loaded.inputs[name].second_moment, entry.second_moment)
    (tmp_path / "s.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match="not a file of statistics"):
        Statistics.load(tmp_path / "s.safetensors")


def test_covariance_survives_a_mean_far_larger_than_the_variance():
    layer = nn.ModuleList([nn.Linear(6, 4)])

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layer

        def forward(self, input_ids, attention_mask):
            return self.layers[0](input_ids)

    x = 3000 + torch.randn(8, 50, 6) * 0.1
    batches = [
        {"input_ids": part, "attention_mask": torch.ones(part.shape[:2])} for part in x.split(2)
    ]
    model = Shifted()
    statistics = (
        collect_statistics(model, batches, {"layers.0": layer[0]}, progress=False)
        .of("layers.0")
        .inputs
    )
    torch.testing.assert_close(
        statistics.covariance, x.double().flatten(0, 1).T.cov(correction=0), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_full_rank_keeps_the_logits(family, method):
    model, batch = tiny_model(family), tiny_batch()
    plan = RankPlan(
        {
            name: MatrixPlan(m.in_features, m.out_features, min(m.weight.shape))
            for name, m in select_linears(model).items()
        }
    )
    low = copy.deepcopy(model)
    decompose_(
        low,
        DecompositionConfig(method),
        statistics=statistics_of(model, needs=NEEDS),
        plan=plan,
        progress=False,
    )
    assert sum(isinstance(module, LowRankLinear) for module in low.modules()) == len(plan.matrices)
    with torch.no_grad():
        torch.testing.assert_close(low(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)


def test_a_rank_at_break_even_leaves_the_layer_dense_and_says_so(caplog):
    model = tiny_model("bert")
    with caplog.at_level(logging.INFO, "bert_decomp"):
        plan = decompose_(model, DecompositionConfig("svd", rank=18), progress=False)
    assert plan.matrices["bert.encoder.layer.0.attention.self.query"].rank is None
    assert plan.matrices["bert.encoder.layer.0.intermediate.dense"].rank == 18
    assert type(model.get_submodule("bert.encoder.layer.1.attention.self.key")) is nn.Linear
    assert "rank 18 >= break-even 18 for 36x36: layer left dense" in caplog.text


@pytest.mark.parametrize(
    "rank,word",
    [(0, "smallest is 1"), (-4, "smallest is 1"), (23, "largest that compresses one is 22")],
)
def test_impossible_ranks_name_the_nearest_possible_one(rank, word):
    model = tiny_model("bert")
    with pytest.raises(UserError, match=word):
        decompose_(model, DecompositionConfig("svd", rank=rank), progress=False)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    if rank > 0:
        uniform(shapes_of(select_linears(model)), 22)


@pytest.mark.parametrize("fraction", [0.06, 0.25, 0.4785, 0.9])
def test_a_budget_is_kept_and_used(fraction):
    modules = shapes_of(select_linears(tiny_model("bert")))
    plan = within_fraction(modules, fraction)
    rank = max(entry.rank for entry in plan.matrices.values() if entry.rank)
    assert plan.encoder_fraction <= fraction
    # One more may reach break-even everywhere.
    with contextlib.suppress(UserError):
        assert uniform(modules, rank + 1).encoder_fraction > fraction


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 1e-4])
def test_impossible_budgets_are_refused(fraction):
    with pytest.raises(UserError):
        within_fraction(shapes_of(select_linears(tiny_model("bert"))), fraction)


def test_plans_round_trip_and_refuse_what_is_malformed():
    plan = uniform(shapes_of(select_linears(tiny_model("bert"))), 5)
    assert RankPlan.from_dict(plan.to_dict()) == plan
    good = plan.to_dict()
    name = next(iter(good["matrices"]))
    for bad in (
        {},
        [],
        {**good, "version": 2},
        {"version": 1, "matrices": {name: {"rank": 3}}},
        {"version": 1, "matrices": {name: {**good["matrices"][name], "rank": 2.5}}},
        {"version": 1, "matrices": {name: {**good["matrices"][name], "rank": 0}}},
    ):
        with pytest.raises(UserError):
            RankPlan.from_dict(bad)


def test_a_plan_or_statistics_of_another_model_leave_the_model_as_it_was():
    model = tiny_model("bert")
    before = {name: type(module) for name, module in model.named_modules()}
    other = uniform(shapes_of(select_linears(tiny_model("roberta"))), 5)
    wrong = tiny_model("bert", hidden_size=40, intermediate_size=57)
    for arguments in (
        {"config": DecompositionConfig("svd"), "plan": other},
        {"config": DecompositionConfig("whiten", rank=5)},
        {"config": DecompositionConfig("whiten", rank=5), "statistics": statistics_of(wrong)},
    ):
        with pytest.raises(UserError):
            decompose_(model, **arguments, progress=False)
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_whiten_beats_svd_on_the_calibration_set_at_the_same_size():
    model, batch = tiny_model("bert"), tiny_batch(40)
    statistics = statistics_of(model, [batch])
    errors = {}
    with torch.no_grad():
        logits = model(**batch).logits
        for method in ("svd", "whiten"):
            low = copy.deepcopy(model)
            decompose_(
                low, DecompositionConfig(method, rank=12), statistics=statistics, progress=False
            )
            errors[method] = (low(**batch).logits - logits).square().mean()
    assert errors["whiten"] < errors["svd"]


def test_spectra_start_at_one_and_fall():
    model = tiny_model("distilbert")
    for values in relative_spectra(
        model, DecompositionConfig("whiten"), statistics_of(model)
    ).values():
        assert values[0] == 1 and (values[1:] <= values[:-1]).all()
