"""The word embedding as one more block of a budget of the whole model's parameters, and what becomes of it."""

import copy
import json

import pytest
import torch
from embedding_cases import (
    BATCHES,
    UNITS,
    decomposed,
    entry,
    every_units,
    logits,
    parameters,
    wide,
)
from tiny_models import tiny_batch, tiny_model
from transformers import BertConfig, BertForMaskedLM

from bert_decomp import DecompositionConfig, UserError, decompose_
from bert_decomp.decomposition.blocks_latency import random_blocks_twin
from bert_decomp.methods import embedding as method
from bert_decomp.methods.embedding import FactoredTable, expected_frequency
from bert_decomp.models.embedding import word_embedding
from bert_decomp.planning import RankProblem, check_config, read_plan
from bert_decomp.planning.embedding import parameters_saved
from bert_decomp.statistics import collect_embedding


@every_units
@pytest.mark.parametrize("fraction", [0.3, 0.62, 0.9])
def test_no_rank_that_is_given_and_no_dense_embedding_is_expected_to_lose_less(units, fraction):
    model = wide()
    _, plan = decomposed(model, units=units, model_fraction=fraction)
    choices = [{"embedding_rank": rank} for rank in (1, 3, 6, 12, 18, 24, 30, 32)]
    if units == "matrices":
        choices.append({"exclude": ["*word_embeddings"]})
    compared = 0
    for choice in choices:
        try:
            _, other = decomposed(model, units=units, model_fraction=fraction, **choice)
        except UserError as error:
            assert "model_fraction" in str(error)
            continue
        compared += 1
        assert plan.expected_loss <= other.expected_loss * (1 + 1e-9), choice
    assert compared


@every_units
def test_where_the_embedding_matters_more_the_encoder_pays(units):
    """Its gradients are what an error there costs: with larger ones it gets a higher rank, and the encoder a smaller
    share."""
    model, ranks = wide(), []
    config = DecompositionConfig(units=units, model_fraction=0.3)
    for scale in (1e-3, 1.0, 1e3):
        statistics = collect_all(model)
        statistics.embedding.gradients *= scale
        student = copy.deepcopy(model)
        plan = decompose_(student, config, BATCHES, statistics=statistics, progress=False)
        ranks.append((entry(plan).rank, -plan.encoder_fraction))
    assert ranks == sorted(ranks) and ranks[0] < ranks[2]


def collect_all(model):
    from bert_decomp.models.selection import select_linears
    from bert_decomp.statistics import collect_statistics

    statistics = collect_statistics(
        model, BATCHES, select_linears(model), needs=("gradients",), progress=False
    )
    statistics.embedding = collect_embedding(model, BATCHES, progress=False)
    return statistics


@every_units
def test_a_plan_that_cuts_nothing_changes_nothing_and_an_edited_one_is_applied(units, tmp_path):
    model = wide()
    _, plan = decomposed(model, units=units, model_fraction=0.3)
    value = json.loads(json.dumps(plan.to_dict()))
    assert type(plan).from_dict(value) == plan
    name = word_embedding(model)[0]

    def applied(change):
        changed = copy.deepcopy(value)
        change(changed)
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        options = {} if units == "matrices" else {"refit": False}
        return decomposed(model, plan_file=str(tmp_path / "plan.json"), **options)[0]

    def cut(changed):
        changed["embeddings"][name] = {**changed["embeddings"][name], "rank": 5}

    def leave_all(changed):
        changed["embeddings"][name]["rank"] = None
        for matrix in changed.get("matrices", {}).values():
            matrix["rank"] = None
        sizes = changed.get("sizes", {})
        for layer in changed.get("layers", {}).values():
            layer.update(
                heads=list(range(sizes["heads"])),
                score_size=sizes["head_size"],
                value_size=sizes["head_size"],
                neurons=sizes["neurons"],
                ranks={},
            )

    assert applied(cut).get_input_embeddings().rank == 5
    assert applied(lambda changed: changed.pop("embeddings")).get_input_embeddings().weight.shape
    assert torch.equal(logits(applied(leave_all)), logits(model))


@every_units
@pytest.mark.parametrize(
    "change,message",
    [
        ({"rank": 99}, "full rank is 36"),
        ({"rank": True}, "positive whole numbers"),
        ({"in_features": 612}, "is not the word embedding of this model"),
        ({"expected_loss": -1}, "it is a number or null"),
        ({"smaller_ranks": [3]}, "smaller_ranks"),
        ({"colour": 3}, "malformed"),
    ],
)
def test_a_plan_that_is_not_the_embeddings_is_refused(units, change, message, tmp_path):
    model = wide()
    _, plan = decomposed(model, units=units, model_fraction=0.3)
    value = plan.to_dict()
    value["embeddings"][word_embedding(model)[0]].update(change)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as error:
        decomposed(model, plan_file=str(tmp_path / "plan.json"))
    assert "\n" not in str(error.value)
    (tmp_path / "plan.json").write_text(json.dumps({**value, "embeddings": [3]}))
    with pytest.raises(UserError, match="not a table of names"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_fraction": 0.4},
        {"flops_fraction": 0.7},
        {"nested_fractions": [0.6, 0.3]},
        {"model_fraction": 0.9, "allocation": "uniform"},
        {"model_fraction": 0.9, "method": "svd", "allocation": "waterfill"},
        {"model_fraction": 0.9, "exclude": ["*.word_embeddings"]},
        {"model_fraction": 0.95, "include": ["*.query", "*.intermediate.dense"]},
        {"encoder_fraction": 0.4, "units": "structured"},
        {"flops_fraction": 0.5, "units": "mixed"},
        {"nested_fractions": [0.6, 0.3], "units": "structured"},
    ],
)
def test_other_budgets_leave_it_alone(options):
    student, plan = decomposed(wide(), **options)
    assert not plan.embeddings and "embeddings" not in plan.to_dict()
    assert type(student.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize("units", ["structured", "mixed"])
@pytest.mark.parametrize(
    "size",
    [{"encoder_fraction": 0.4}, {"flops_fraction": 0.5}, {"model_fraction": 0.3}, {"max_drop": 90}],
)
def test_a_rank_that_is_given_goes_with_every_size_of_units(units, size):
    config = DecompositionConfig(units=units, embedding_rank=5, **size)
    model = wide()
    student = copy.deepcopy(model)
    plan = decompose_(student, config, BATCHES, held_out=[tiny_batch(12)], progress=False)
    assert student.get_input_embeddings().rank == entry(plan).rank == 5
    assert plan.flops == sum(
        2 * layer.weights(plan.sizes) for layer in plan.layers.values()
    ) + 2 * 5 * (36)
    assert random_blocks_twin(model, plan).get_input_embeddings().rank == 5
    if "model_fraction" in size:
        assert parameters(student) <= 0.3 * parameters(model)


def test_a_shared_embedding_is_left_alone_or_refused_by_name():
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=613, intermediate_size=57, **sizes)).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert RankProblem.of(model, DecompositionConfig(model_fraction=0.9)).embedding is None
    with pytest.raises(
        UserError, match=r"decoder of BertForMaskedLM shares .* drop embedding_rank"
    ):
        check_config(model, DecompositionConfig(encoder_fraction=0.5, embedding_rank=5))


@every_units
def test_small_and_narrow_embeddings_are_cut_where_that_saves_something(units):
    """ELECTRA's is narrower than the encoder; of 37 tokens a few ranks save parameters, of 2 none."""
    narrow = wide("electra", embedding_size=17)
    student, plan = decomposed(narrow, units=units, model_fraction=0.35)
    assert parameters(student) <= 0.35 * parameters(narrow)
    assert entry(plan).out_features == 17
    model = tiny_model("bert", vocab_size=62)
    _, plan = decomposed(model, units=units, model_fraction=0.5)
    assert entry(plan).rank is None or parameters_saved(entry(plan)) > 0


def test_a_large_table_is_worked_through_in_parts(monkeypatch):
    model = wide()
    _, module = word_embedding(model)
    statistics = collect_embedding(model, BATCHES, progress=False)
    whole = FactoredTable.of(module, statistics)
    monkeypatch.setattr(method, "ROWS", 100)
    parts = FactoredTable.of(module, statistics)
    torch.testing.assert_close(parts.losses, whole.losses)
    ids = torch.arange(613)
    torch.testing.assert_close(parts.layer(7)(ids), whole.layer(7)(ids))


def test_tokens_that_the_text_lacks_are_expected_as_often_as_those_it_has_once():
    draw = torch.Generator().manual_seed(5)
    likely = torch.arange(1, 4001).double().reciprocal()
    text, other = (
        torch.multinomial(likely, 5000, replacement=True, generator=draw).bincount(minlength=4000)
        for _ in range(2)
    )
    expected = expected_frequency(text.double())
    lacking = text == 0
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0).double())
    assert abs(expected[lacking].sum() - other[lacking].sum() / 5000) < 0.02
    assert expected[lacking].max() <= expected[text == 1].min()
    assert (expected[text == 2] / expected[text == 1][0] == 2).all()


def test_what_lacks_or_contradicts_is_one_line():
    model = wide()
    config = DecompositionConfig(model_fraction=0.3)
    statistics = collect_all(model)
    statistics.embedding = None
    with pytest.raises(UserError, match="collect_embedding, or set the size") as error:
        decompose_(model, config, statistics=statistics, progress=False)
    assert "\n" not in str(error.value)
    for units in UNITS:
        with pytest.raises(UserError, match="the smallest is 0\\."):
            decomposed(model, units=units, model_fraction=0.01)
        with pytest.raises(UserError, match="give less than that"):
            decomposed(model, units=units, model_fraction=0.99, embedding_rank=5)
    with pytest.raises(UserError, match="drop embedding_rank"):
        DecompositionConfig(plan_file="plan.json", embedding_rank=5, units="structured")
