"""The factored word embedding: a bound it must reach, the families it must fit, and all that a run does with it."""

import copy
import json

import pytest
import torch
from cases import arguments
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.methods import shrunk
from bert_decomp.methods.embedding import SHRINKAGE, FactoredTable, expected_frequency
from bert_decomp.models.embedding import LowRankEmbedding, word_embedding
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save
from bert_decomp.models.selection import select_linears
from bert_decomp.planning import RankPlan, check_config, plan_ranks
from bert_decomp.runtime import fuse_, unfuse_
from bert_decomp.statistics import (
    EmbeddingStatistics,
    Statistics,
    collect_embedding,
    stored_embedding,
)


def statistics_of(model, batch):
    return Statistics({}, {}, "none", embedding=collect_embedding(model, [batch], progress=False))


def with_factors(family="bert", rank=7, **changes):
    model, batch = tiny_model(family), tiny_batch()
    config = DecompositionConfig("svd", rank=7, embedding_rank=rank, **changes)
    return model, decompose_(model, config, statistics=statistics_of(model, batch), progress=False)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("tokens,width,rank", [(53, 19, 1), (53, 19, 7), (9, 31, 5)])
def test_no_other_factors_of_that_rank_lose_less(tokens, width, rank):
    """The optimum of the weighted problem is the SVD of diag(f)^(1/2) (E - mean) L, cut."""
    embedding = torch.nn.Embedding(tokens, width, padding_idx=3).double()
    root = torch.randn(width, width, dtype=torch.float64)
    statistics = EmbeddingStatistics(torch.arange(tokens).double() % 5, root @ root.T)
    found = FactoredTable.of(embedding, statistics).layer(rank)
    frequency = expected_frequency(statistics.counts)
    metric = torch.linalg.cholesky(shrunk(statistics.gradients, SHRINKAGE))
    scaled = frequency.sqrt()[:, None] * (embedding.weight - frequency @ embedding.weight) @ metric
    error = frequency.sqrt()[:, None] * (embedding.weight - found(torch.arange(tokens))) @ metric
    bound = torch.linalg.svdvals(scaled)[rank:].square().sum()
    torch.testing.assert_close(error.square().sum(), bound, rtol=1e-9, atol=1e-12)
    # What is foreseen counts besides that a normalisation makes what is left larger again.
    table, answers = FactoredTable.of(embedding, statistics), found(torch.arange(tokens))
    left, whole = (frequency @ x.square().sum(1) for x in (answers, embedding.weight))
    torch.testing.assert_close(table.kept[rank], left / whole)
    torch.testing.assert_close(table.losses[rank], bound * whole / left)
    assert found.padding_idx == 3 and found.codes.shape == (tokens, rank)


def test_full_rank_is_the_dense_embedding_and_padding_gets_no_gradient():
    embedding = torch.nn.Embedding(41, 12, padding_idx=2)
    statistics = EmbeddingStatistics(torch.ones(41).double(), torch.eye(12).double())
    found = FactoredTable.of(embedding, statistics).layer(12)
    ids = torch.tensor([[0, 2, 40], [2, 7, 7]])
    torch.testing.assert_close(found(ids), embedding(ids), rtol=1e-5, atol=1e-5)
    found(ids).square().sum().backward()
    assert not found.codes.grad[2].any() and found.codes.grad[7].any() and found.up.grad.any()


def test_statistics_count_real_tokens_and_are_kept_for_their_model_alone(tmp_path):
    model, batch = tiny_model("bert"), tiny_batch()
    found = stored_embedding(model, [batch], tmp_path / "e.safetensors")
    assert found.counts.sum() == batch["attention_mask"].sum() and found.gradients.trace() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = stored_embedding(model, [batch], tmp_path / "e.safetensors")
    assert torch.equal(again.gradients, found.gradients) and torch.equal(again.counts, found.counts)
    with pytest.raises(UserError, match="another model or other data"):
        stored_embedding(model, [tiny_batch(7)], tmp_path / "e.safetensors")


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_every_family_saves_loads_fuses_and_trains_with_it(family, tmp_path):
    model, plan = with_factors(family)
    batch = tiny_batch()
    assert (
        type(model.get_input_embeddings()) is LowRankEmbedding
        and next(iter(plan.embeddings.values())).rank == 7
    )
    expected = logits(model, batch)
    save(model, None, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert torch.equal(logits(loaded, batch), expected)
    torch.testing.assert_close(logits(fuse_(loaded), batch), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(unfuse_(loaded), batch), expected)
    loaded.train()(**batch).loss.backward()
    assert (
        loaded.get_input_embeddings().codes.grad.any()
        and loaded.get_input_embeddings().up.grad.any()
    )


def test_a_whole_budget_counts_it_and_its_plan_can_be_edited():
    model, batch = tiny_model("bert"), tiny_batch()
    before = sum(p.numel() for p in model.parameters())
    statistics, config = (
        statistics_of(model, batch),
        DecompositionConfig("svd", model_fraction=0.7, embedding_rank=5),
    )
    plan = plan_ranks(model, config)
    student = copy.deepcopy(model)
    decompose_(student, config, statistics=statistics, plan=plan, progress=False)
    assert sum(p.numel() for p in student.parameters()) <= 0.7 * before
    dense = plan_ranks(model, DecompositionConfig("svd", model_fraction=0.7))
    assert plan.encoder_fraction > dense.encoder_fraction and "embeddings" not in dense.to_dict()
    value = json.loads(json.dumps(plan.to_dict()))
    name = word_embedding(model)[0]
    value["embeddings"][name]["rank"] = 9
    edited = RankPlan.from_dict(value)
    assert edited.flops - plan.flops == 2 * 4 * 36
    decompose_(model, config, statistics=statistics, plan=edited, progress=False)
    assert model.get_input_embeddings().rank == 9
    with pytest.raises(UserError, match="no dense word embedding"):
        word_embedding(model)


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"embedding_rank": 0}, "give 1 to 23"),
        ({"embedding_rank": 24}, "give 1 to 23"),
        ({"embedding_rank": 5, "plan_file": "p.json"}, "drop embedding_rank"),
        ({"embedding_rank": 5, "model_fraction": 0.99}, "give less than that"),
        (
            {"embedding_rank": 5, "model_fraction": 0.01},
            "dense parts and the least ranks weigh; the smallest is 0.",
        ),
    ],
)
def test_impossible_requests_are_one_line_with_what_is_possible(changes, word):
    with pytest.raises(UserError, match=word) as error:
        check_config(tiny_model("bert"), DecompositionConfig("svd", **changes))
    assert "\n" not in str(error.value)


def test_statistics_or_a_plan_of_another_model_are_refused():
    model, batch = tiny_model("bert"), tiny_batch()
    config = DecompositionConfig("svd", rank=7, embedding_rank=5)
    with pytest.raises(UserError, match="collect_embedding"):
        decompose_(model, config, statistics=None, progress=False)
    with pytest.raises(UserError, match="collect them again"):
        decompose_(
            model,
            config,
            statistics=statistics_of(tiny_model("bert", vocab_size=61), batch),
            progress=False,
        )
    with pytest.raises(UserError, match="is not the word embedding"):
        decompose_(
            model,
            config,
            statistics=None,
            plan=plan_ranks(tiny_model("bert", vocab_size=61), config),
            progress=False,
        )
    assert len(select_linears(model)) == 18


@pytest.mark.slow
def test_the_main_job_cuts_distils_saves_reports_and_repeats_it_from_a_plan(
    data, encoder_folder, capsys
):
    line = arguments(
        data, encoder_folder, method="svd", rank=9, embedding_rank=6, num_train_epochs=1
    )
    assert command(main, line) == 0
    model = load_model(str(data / "run" / "model"))
    results = json.loads((data / "run" / "results.json").read_text())
    assert model.get_input_embeddings().rank == 6
    assert results["parameters"]["student"]["whole"] == sum(p.numel() for p in model.parameters())
    assert "is cut to rank 6" in (data / "run" / "report.html").read_text()
    again = arguments(
        data,
        encoder_folder,
        "again",
        method="svd",
        plan_file=data / "run" / "plan.json",
        num_train_epochs=1,
    )
    assert command(main, again) == 0
    assert load_model(str(data / "again" / "model")).get_input_embeddings().rank == 6
