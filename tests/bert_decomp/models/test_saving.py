"""A saved low-rank model loads through transformers alone, to the bit, and trains on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_SIZES, made_once, tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.models.loading import count_parameters, load_model
from bert_decomp.models.saving import LowRankConfig, save
from lowrank_kernels import LowRankLinear


@made_once
def low_rank(family="bert"):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_saved_equals_loaded_to_the_bit(family, tmp_path):
    model, batch = low_rank(family), tiny_batch()
    save(model, None, tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert sum(isinstance(module, LowRankLinear) for module in loaded.modules()) > 0
    assert torch.equal(logits(loaded.eval(), batch), logits(model, batch))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(load_model(str(again)), batch), logits(model, batch))


def test_a_loaded_model_trains_and_moves_every_factor(tmp_path):
    save(low_rank(), None, tmp_path / "model")
    model = load_model(str(tmp_path / "model")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    still = [
        name
        for name, value in model.state_dict().items()
        if name.endswith((".down", ".up")) and torch.equal(value, before[name])
    ]
    assert not still


def test_only_safetensors_and_json_are_written(tmp_path):
    save(low_rank(), None, tmp_path / "model")
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}
    assert not list(tmp_path.glob(".partial-*"))


def test_saving_over_an_older_model_replaces_it_whole(tmp_path):
    save(tiny_model("bert"), None, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("old")
    model = low_rank()
    save(model, None, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert torch.equal(
        logits(load_model(str(tmp_path / "model")), tiny_batch()), logits(model, tiny_batch())
    )


def test_a_failed_save_keeps_the_older_model(tmp_path, monkeypatch):
    model = low_rank()
    save(model, None, tmp_path / "model")

    def full_disk(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save(low_rank(), None, tmp_path / "model")
    assert torch.equal(
        logits(load_model(str(tmp_path / "model")), tiny_batch()), logits(model, tiny_batch())
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    "damage,word",
    [
        (lambda f: _edit_tensors(f, lambda t: t.pop(f"{QUERY}.down")), "lacks tensors"),
        (
            lambda f: _edit_tensors(
                f, lambda t: t.update({"bert.encoder.layer.9.extra": torch.zeros(2)})
            ),
            "foreign tensors",
        ),
        (
            lambda f: _edit_tensors(f, lambda t: t.update({f"{QUERY}.up": torch.zeros(2, 2)})),
            "cannot load|wrongly shaped",
        ),
        (
            lambda f: _edit_config(f, lambda c: c["quantization_config"].update(version=9)),
            "version",
        ),
        (
            lambda f: _edit_config(
                f,
                lambda c: c["quantization_config"]["modules"].update(
                    {"no.such": {"rank": 1, "bias": True}}
                ),
            ),
            "not a linear layer",
        ),
        (
            lambda f: _edit_config(
                f, lambda c: c["quantization_config"]["modules"][QUERY].update(rank=10**9)
            ),
            "more than full",
        ),
        (
            lambda f: _edit_config(
                f, lambda c: c["quantization_config"]["modules"][QUERY].update(rank="x")
            ),
            "malformed",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:1000]
            ),
            "cannot load",
        ),
        (lambda f: (f / "config.json").write_text("{"), "cannot load"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, word):
    save(low_rank(), None, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=word) as refusal:
        load_model(str(tmp_path / "model"))
    assert "\n" not in str(refusal.value)


def test_the_config_describes_the_model_and_counts_are_right():
    dense, model = tiny_model("bert"), low_rank()
    modules = LowRankConfig.of(model).modules
    assert len(modules) == 18 and all(
        entry == {"rank": 7, "bias": True} for entry in modules.values()
    )
    saved = 3 * (4 * (36 * 36 - 7 * 72) + 2 * (36 * 57 - 7 * 93))
    for part in ("whole", "encoder"):
        assert count_parameters(dense)[part] - count_parameters(model)[part] == saved
    layers = sum(p.numel() for p in dense.bert.encoder.parameters())
    assert count_parameters(dense)["encoder"] == layers
