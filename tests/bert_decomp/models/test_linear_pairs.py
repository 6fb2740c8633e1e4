"""Factored layers as pairs of ``nn.Linear``: the same model for whoever computes, trains, saves or quantises it."""

import copy

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from bert_decomp import (
    DecompositionConfig,
    UserError,
    decompose_,
    fuse_,
    join_linears_,
    save,
    split_linears_,
    unfuse_,
)
from bert_decomp.models.linear_pairs import LinearPair
from lowrank_kernels import LowRankLinear

BATCH = tiny_batch(7)


@pytest.fixture
def model():
    model = tiny_model("bert")
    decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def kinds(model):
    return [type(module) for module in model.modules()]


def test_split_and_joined_it_is_the_same_model_with_the_same_parameters(model):
    before, types, result = copy.deepcopy(model.state_dict()), kinds(model), logits(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    split_linears_(model)
    assert LowRankLinear not in kinds(model) and LinearPair in kinds(model)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert torch.equal(logits(model), result)
    assert torch.equal(logits(copy.deepcopy(model)), result)
    assert model.state_dict().keys() == before.keys()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(before)
    assert torch.equal(logits(join_linears_(model)), result)
    assert kinds(model) == types


def test_a_split_model_saves_fuses_and_takes_half_precision_as_before(model, tmp_path):
    result = logits(model)
    split_linears_(model)
    save(model, None, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        assert LowRankLinear in kinds(loaded)
        assert torch.equal(logits(loaded), result)
    torch.testing.assert_close(logits(fuse_(model)), result)
    torch.testing.assert_close(logits(unfuse_(model)), result)
    assert LinearPair in kinds(model)
    assert next(join_linears_(model.half()).parameters()).dtype == torch.float16


def test_an_adapter_trains_and_merges_into_the_factors(model, tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["down", "up"], r=2, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(split_linears_(model), config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    start = logits(adapted.eval())
    for _ in range(3):
        adapted.zero_grad()
        adapted(**BATCH).loss.backward()
        optimizer.step()
    result = logits(adapted)
    assert not torch.allclose(result, start, atol=1e-3)
    with pytest.raises(UserError, match=r"Linear of peft.*merge_and_unload"):
        join_linears_(adapted)
    merged = join_linears_(adapted.merge_and_unload())
    torch.testing.assert_close(logits(merged), result, rtol=1e-4, atol=1e-5)
    save(merged, None, tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(merged))
    assert LowRankLinear in kinds(loaded)


class Foreign(torch.Tensor):
    """Stands for the tensors that quantisers put into linear layers in the place of weights."""


def test_a_quantiser_finds_the_factors_and_they_do_not_join(model):
    split_linears_(model)
    found = [module for module in model.bert.encoder.modules() if isinstance(module, nn.Linear)]
    assert len(found) == 2 * sum(isinstance(module, LinearPair) for module in model.modules())
    found[0].weight = nn.Parameter(found[0].weight.detach().as_subclass(Foreign))
    with pytest.raises(UserError, match="a split layer holds a Foreign of"):
        join_linears_(model)
    assert LowRankLinear not in kinds(model)
