"""What version 0.1.0 wrote loads forever. ``tests/fixtures/0.1.0`` holds one small folder of each kind, made by
``make.py`` there with the code of that version, and the logits that the saved models gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import bert_decomp  # noqa: F401  (it registers the format)
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.apply import apply_plan_
from bert_decomp.models.embedding import LowRankEmbedding
from bert_decomp.models.loading import load_model
from bert_decomp.planning import read_plan
from bert_decomp.statistics import EmbeddingStatistics, Statistics
from lowrank_kernels import LowRankLinear

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "0.1.0"


@pytest.mark.parametrize("load", [load_model, AutoModelForSequenceClassification.from_pretrained])
@pytest.mark.parametrize("kind", ["linear", "embedding", "without-bias", "added-bias"])
def test_a_saved_model_loads_and_answers_as_it_did(kind, load):
    model = load(str(FOLDER / kind)).eval()
    answers = load_file(FOLDER / kind / "answers.safetensors")
    logits = answers.pop("logits")
    with torch.no_grad():
        torch.testing.assert_close(model(**answers).logits, logits, rtol=1e-5, atol=1e-6)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert layers
    assert all((layer.bias is None) == (kind == "without-bias") for layer in layers)
    embedding = isinstance(model.get_input_embeddings(), LowRankEmbedding)
    assert embedding == (kind == "embedding")


def test_a_plan_and_statistics_load_and_make_the_saved_model_again():
    """The plan and the statistics are of the model in the folder ``embedding``. Factors of an embedding are made in
    another way since 0.2.0, so its own are put back."""
    plan = read_plan(FOLDER / "plan.json")
    statistics = Statistics.load(FOLDER / "statistics.safetensors")
    statistics.embedding = EmbeddingStatistics.load(
        FOLDER / "embedding.safetensors", statistics.fingerprint
    )
    assert set(statistics.source) == set(plan.matrices)
    assert set(statistics.gradients) == set(statistics.fisher) == set(plan.matrices)
    model = load_model(str(FOLDER / "dense")).eval()
    apply_plan_(model, plan, DecompositionConfig("coupled"), statistics, progress=False)
    answers = load_file(FOLDER / "embedding" / "answers.safetensors")
    logits = answers.pop("logits")
    saved = load_model(str(FOLDER / "embedding")).get_input_embeddings()
    assert model.get_input_embeddings().codes.shape == saved.codes.shape
    model.set_input_embeddings(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(**answers).logits, logits, rtol=1e-4, atol=1e-5)
