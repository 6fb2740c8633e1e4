"""Rank plans: what an allocation must do whatever the spectra, and what each target must meet."""

import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch
from spectra import ONES, SHAPES, decomposed, falling
from tiny_models import tiny_batch, tiny_model

from bert_decomp.config import RENAMED, DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.decomposition.search import plan_for_config, plan_for_latency, plan_for_max_drop
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.methods import METHODS
from bert_decomp.models.selection import select_linears
from bert_decomp.planning import (
    MatrixPlan,
    RankPlan,
    budget_for_flops,
    budget_for_model,
    check_config,
    for_max_drop,
    fraction_of,
    plan_ranks,
    sensitivity_weights,
    shapes_of,
    waterfill,
    within_fraction,
)
from bert_decomp.statistics import NEEDS, collect_statistics


@pytest.mark.parametrize("fraction", [0.28, 0.35, 0.6])
@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_waterfill_keeps_the_budget_the_multiple_and_the_least_rank(fraction, multiple, seed):
    plan = waterfill(SHAPES, falling(seed), ONES, fraction, multiple=multiple, min_rank=2)
    assert plan.encoder_fraction <= fraction
    for entry in plan.matrices.values():
        assert entry.rank is None or (
            entry.rank >= 2 and entry.rank % multiple == 0 and entry.rank < entry.break_even_rank
        )


def test_waterfill_loses_least_of_all_plans_of_its_size():
    shapes, spectra = (
        {"a": (6, 6), "b": (6, 9)},
        {"a": torch.tensor([4.0, 3, 2, 1, 0.5, 0.1]), "b": torch.tensor([5.0, 2, 2, 1, 1, 0.3])},
    )
    plan = waterfill(shapes, spectra, {"a": 1.0, "b": 2.0}, 0.6)

    def loss(ranks):
        return sum(
            weight * spectra[name][rank:].square().sum()
            for (name, weight), rank in zip({"a": 1.0, "b": 2.0}.items(), ranks, strict=True)
        )

    weights = sum(entry.weights for entry in plan.matrices.values())
    for ranks in itertools.product((1, 2), (1, 2, 3)):
        if ranks[0] * 12 + ranks[1] * 15 <= weights:
            assert plan.expected_loss <= loss(ranks) + 1e-6


def test_a_matrix_that_the_loss_minds_more_gets_more_and_groups_share():
    spectra = falling()
    spectra["b"] = spectra["a"]
    plan = waterfill(SHAPES, spectra, {**ONES, "b": 20.0}, 0.35)
    assert plan.matrices["b"].rank is None or plan.matrices["b"].rank > plan.matrices["a"].rank
    shared = waterfill(SHAPES, spectra, {**ONES, "b": 20.0}, 0.35, groups=[["a", "b"]])
    assert (
        shared.matrices["a"].rank == shared.matrices["b"].rank and shared.encoder_fraction <= 0.35
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
def test_waterfill_refuses_impossible_budgets(fraction):
    with pytest.raises(UserError, match=r"share between|the smallest is"):
        waterfill(SHAPES, falling(), ONES, fraction)


def test_what_stays_dense_is_counted_in_whole_and_flops_targets():
    model = tiny_model("bert")
    shapes = shapes_of(select_linears(model))
    least = fraction_of(shapes, 1)
    plan = within_fraction(shapes, budget_for_model(model, shapes, 0.75, least))
    whole = sum(p.numel() for p in model.parameters())
    saved = sum(rows * columns for rows, columns in shapes.values()) * (1 - plan.encoder_fraction)
    assert (whole - saved) / whole <= 0.75
    dense = RankPlan({name: MatrixPlan(shape[1], shape[0], None) for name, shape in shapes.items()})
    attention = 4 * 16 * 36 * 3
    plan = within_fraction(shapes, budget_for_flops(shapes, 0.6, 16, 3, 36, least))
    assert plan.flops + attention <= 0.6 * (dense.flops + attention)
    with pytest.raises(UserError, match="dense parts and the least ranks weigh; the smallest is"):
        budget_for_model(model, shapes, 0.01, least)
    with pytest.raises(
        UserError, match="what attention and the least ranks cost at length 512; the smallest is"
    ):
        budget_for_flops(shapes, 0.05, 512, 3, 36, least)


def test_a_quality_is_kept_by_the_smallest_plan_found():
    asked = []

    def metric(plan):
        asked.append(plan.encoder_fraction)
        return 0.9 if plan.encoder_fraction >= 0.4 else 0.5

    plan = for_max_drop(
        0.01, 0.905, lambda share: waterfill(SHAPES, falling(), ONES, share), 0.132, metric
    )
    assert 0.4 <= plan.encoder_fraction <= 0.5 and len(asked) <= 8
    with pytest.raises(UserError, match=r"allow at least 0.5"):
        for_max_drop(
            0.1,
            1.0,
            lambda share: waterfill(SHAPES, falling(), ONES, share),
            0.132,
            lambda plan: 0.5,
        )


def test_every_allocation_plans_for_a_real_model_and_its_plan_can_be_edited(tmp_path):
    model, batch = tiny_model("bert"), tiny_batch(12)
    statistics = collect_statistics(
        model, [batch], select_linears(model), needs=NEEDS, progress=False
    )
    for method, allocation in itertools.product(
        sorted(METHODS), ("uniform", "waterfill", "sensitivity")
    ):
        config = DecompositionConfig(method, allocation, encoder_fraction=0.4, min_rank=2)
        weights = (
            sensitivity_weights(model, config, statistics, [batch], progress=False)
            if allocation == "sensitivity"
            else None
        )
        plan = plan_ranks(model, config, statistics, weights)
        assert plan.encoder_fraction <= 0.4
    value = plan.to_dict()
    value["matrices"]["bert.encoder.layer.0.output.dense"]["rank"] = 3
    decompose_(model, config, statistics=statistics, plan=RankPlan.from_dict(value), progress=False)
    assert model.get_submodule("bert.encoder.layer.0.output.dense").rank == 3


def test_sensitivity_goes_on_from_its_cache_and_leaves_the_model_dense(tmp_path, monkeypatch):
    model, batch = tiny_model("bert"), tiny_batch(6)
    before = model(**batch).logits
    config = DecompositionConfig("svd", "sensitivity", encoder_fraction=0.4)
    cache = tmp_path / "drops.json"
    first = sensitivity_weights(model, config, None, [batch], cache=cache, progress=False)
    assert min(first.values()) > 0
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    monkeypatch.setattr(
        "bert_decomp.planning.sensitivity.answers", lambda *_: pytest.fail("measured again")
    )
    assert sensitivity_weights(model, config, None, [batch], cache=cache, progress=False) == first


@pytest.mark.parametrize(
    "options,word",
    [
        ({"method": "magic"}, "unknown method"),
        ({"allocation": "fair"}, "unknown allocation"),
        ({"preset": "theirs"}, "unknown preset"),
        ({"rank": 4, "encoder_fraction": 0.3}, "both set the size"),
        ({"rank": 4, "allocation": "waterfill"}, "chooses ranks"),
        ({"min_rank": 0}, "smallest is 1"),
        ({"encoder_fraction": 1.5}, "encoder_fraction is 1.5; give a share"),
        ({"model_fraction": float("nan")}, "model_fraction is nan; give a share"),
    ],
)
def test_contradictory_requests_are_refused_in_one_line(options, word):
    with pytest.raises(UserError, match=word) as error:
        DecompositionConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old,new", RENAMED.items())
def test_a_name_of_version_0_1_is_refused_with_the_new_one(old, new):
    with pytest.raises(UserError, match=f"{old} is now called {new}"):
        DecompositionConfig(**{old: 0.5})


@pytest.mark.parametrize("allocation", ["uniform", "waterfill"])
@pytest.mark.parametrize("multiple,min_rank", [(1, 4), (1, 1), (3, 4)])
@pytest.mark.parametrize("size", ["encoder_fraction", "model_fraction", "flops_fraction"])
def test_the_budget_that_is_named_as_the_smallest_can_be_had(allocation, multiple, min_rank, size):
    """Before anything is collected the check must say what the planning, much later, then takes."""
    model = tiny_model("bert")
    statistics = collect_statistics(
        model, [tiny_batch()], select_linears(model), needs=("gradients",), progress=False
    )
    config = DecompositionConfig(
        "svd", allocation, rank_multiple=multiple, min_rank=min_rank, **{size: 0.001}
    )
    with pytest.raises(UserError, match="the smallest is") as error:
        check_config(model, config)
    smallest = replace(config, **{size: float(str(error.value).split()[-1])})
    check_config(model, smallest)
    plan = plan_ranks(model, smallest, statistics)
    assert {entry.rank for entry in plan.matrices.values()} == {-(-min_rank // multiple) * multiple}


def test_defaults_water_fill_a_budget_and_take_a_rank_as_it_is():
    assert (DecompositionConfig().allocation, DecompositionConfig(rank=9).allocation) == (
        "waterfill",
        "uniform",
    )
    paper = DecompositionConfig(preset="paper")
    assert (paper.method, paper.allocation, paper.needs) == ("svd", "uniform", ())


@pytest.mark.parametrize(
    "given,device,multiple", [(None, "cpu", 1), (None, "cuda", 8), (4, "cuda", 4), (6, "cpu", 6)]
)
def test_ranks_suit_the_device_unless_a_multiple_is_given(given, device, multiple):
    assert (
        DecompositionConfig("svd", rank_multiple=given).multiple_on(torch.device(device))
        == multiple
    )


def test_too_few_tokens_are_said_once(caplog):
    model, batch = tiny_model("bert"), tiny_batch(2)
    statistics = collect_statistics(model, [batch], select_linears(model), progress=False)
    with caplog.at_level(logging.WARNING, "bert_decomp"):
        decompose_(
            model, DecompositionConfig("whiten", rank=5), statistics=statistics, progress=False
        )
    assert len(caplog.records) == 1 and "tokens are few" in caplog.text


@pytest.mark.slow
def test_goals_run_the_model_itself():
    model, batch = tiny_model("bert"), tiny_batch(24)
    with torch.no_grad():
        batch["labels"] = model(
            **{name: batch[name] for name in ("input_ids", "attention_mask")}
        ).logits.argmax(-1)
    statistics = collect_statistics(
        model, [batch], select_linears(model), needs=("gradients",), progress=False
    )
    config = DecompositionConfig(min_rank=2, max_drop=10)
    plan = plan_for_max_drop(model, config, statistics, [batch])
    assert (
        evaluate(decomposed(model, config, statistics, plan), [batch], progress=False)["accuracy"]
        >= 0.9
    )
    with pytest.raises(UserError, match="dense model takes"):
        slow = DecompositionConfig(min_rank=2, latency_ms=1e6, latency_seq_length=8)
        plan_for_latency(model, slow, statistics)


def test_a_plan_edited_by_hand_is_applied_as_it_is(tmp_path):
    model = tiny_model("bert")
    plan = plan_ranks(model, DecompositionConfig("svd", rank=9)).to_dict()
    name = next(iter(plan["matrices"]))
    plan["matrices"][name]["rank"] = 5
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    config = DecompositionConfig("svd", plan_file=str(tmp_path / "plan.json"))
    found = plan_for_config(model, config, None, [])
    student = decomposed(model, config, None, found)
    assert student.get_submodule(name).rank == 5 and found.to_dict()["matrices"] == plan["matrices"]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="not a rank plan"):
        plan_for_config(model, config, None, [])
