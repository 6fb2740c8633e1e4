"""Factors multiplied out: the same outputs, from a folder that transformers loads without this package."""

import copy
import subprocess
import sys

import pytest
import torch
from cases import resized
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_SIZES, made_once, tiny_batch, tiny_model
from torch import nn

from bert_decomp import DecompositionConfig, decompose_, fuse_, save
from bert_decomp.errors import UserError
from bert_decomp.exporting.dense import dense
from bert_decomp.models.embedding import LowRankEmbedding
from bert_decomp.models.resized import RESIZED, ResizedLinear
from bert_decomp.models.saving import mark_low_rank
from lowrank_kernels import LowRankLinear

BATCH = {name: value for name, value in tiny_batch().items() if name != "labels"}


@made_once
def low_rank(family="bert", method="svd", embedding=False):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig(method, rank=7), [tiny_batch(20, 13)], progress=False)
    if embedding:
        old = model.get_input_embeddings()
        model.set_input_embeddings(
            LowRankEmbedding(old.num_embeddings, old.embedding_dim, 5, old.padding_idx)
        )
        mark_low_rank(model)
    return model


@torch.no_grad()
def outputs(model):
    return model(**BATCH)[0]


@pytest.mark.parametrize("method", ["svd", "whiten"])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_outputs_are_the_same_in_every_family(family, embedding, method):
    """``whiten`` adds a bias to layers of ModernBERT, whose architecture has none unless its config says so."""
    model = low_rank(family, method, embedding)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for form in (model, model.base_model):
        plain = dense(form)
        assert type(plain) is type(form) and not plain.training
        kinds = (LowRankLinear, LowRankEmbedding)
        assert not any(isinstance(module, kinds) for module in plain.modules())
        wanted = outputs(form)
        assert (outputs(plain) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_resized_units_are_padded_without_a_change(family):
    model = resized(family)
    before = outputs(model)
    plain = dense(model)
    fresh = type(plain)(plain.config).eval()
    fresh.load_state_dict(plain.state_dict())
    for form in (plain, fresh, copy.deepcopy(plain)):
        assert not any(isinstance(module, RESIZED) for module in form.modules())
        assert (outputs(form) - before).abs().max() <= 3e-6 * before.abs().max()
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype):
    plain = dense(low_rank().to(dtype))
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}


@pytest.mark.slow
def test_plain_transformers_loads_the_folders(tmp_path):
    """In a process that knows nothing of this package."""
    models = {
        family: low_rank(family, "whiten", embedding=True) for family in ("bert", "modernbert")
    }
    for family, model in models.items():
        save(dense(model), None, tmp_path / family)
    save_file(BATCH, tmp_path / "batch.safetensors")
    script = (
        "import sys, torch, transformers as t\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "results = {}\n"
        "for family in sys.argv[2:]:\n"
        "    model, info = t.AutoModelForSequenceClassification.from_pretrained(\n"
        "        f'{sys.argv[1]}/{family}', output_loading_info=True)\n"
        "    assert not any(info.values()), info\n"
        "    with torch.no_grad():\n"
        "        results[family] = model.eval()(**load_file(sys.argv[1] + '/batch.safetensors')).logits\n"
        "assert 'bert_decomp' not in sys.modules and 'lowrank_kernels' not in sys.modules\n"
        "save_file(results, sys.argv[1] + '/results.safetensors')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *models], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    results = load_file(tmp_path / "results.safetensors")
    for family, model in models.items():
        wanted = outputs(model)
        assert (results[family] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), family


def test_what_no_plain_model_holds_is_refused():
    with pytest.raises(UserError, match="unfuse_ it first"):
        dense(fuse_(low_rank()))
    model = low_rank()
    model.bert.pooler.dense = ResizedLinear(36, 35)
    with pytest.raises(UserError, match="export it to onnx"):
        dense(model)
    model = low_rank()
    dense_head = nn.Linear(36, 3, bias=False)
    model.classifier = dense_head
    assert outputs(dense(model)).shape == (5, 3)
