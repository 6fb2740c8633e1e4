"""One folder of several sizes: each is what was trained, saved or decomposed at that size alone."""

import copy
import json

import pytest
import torch
from nested_cases import FRACTIONS, every_family, every_form, every_units, logits, logits_at, nested
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from bert_decomp import DecompositionConfig, UserError, decompose_, fuse_
from bert_decomp.exporting.dense import dense
from bert_decomp.exporting.export import export
from bert_decomp.models.architectures import encoder_layers
from bert_decomp.models.loading import count_parameters, load_encoder, load_model
from bert_decomp.models.nested import (
    ALL,
    NestedLinear,
    fractions_of,
    take_size_,
    use_size_,
)
from bert_decomp.models.resized import ResizedAttention
from bert_decomp.models.saving import save
from bert_decomp.planning import RankPlan
from lowrank_kernels import LowRankLinear


@every_family
@pytest.mark.parametrize("method", ["coupled", "svd"])
def test_each_size_is_what_that_plan_alone_makes(family, method):
    model, plan = nested(family, method)
    config = DecompositionConfig(method, encoder_fraction=0.5)
    seen = []
    for fraction in FRACTIONS:
        alone = tiny_model(family)
        decompose_(alone, config, [tiny_batch(20, 13)], plan=plan.at(fraction), progress=False)
        torch.testing.assert_close(logits_at(model, fraction), logits(alone), rtol=1e-4, atol=1e-4)
        seen.append(logits(alone))
    assert not torch.allclose(seen[0], seen[2], atol=1e-2)


def check_sizes(model, plan):
    """That a plain model has the sizes of a plan."""
    if isinstance(plan, RankPlan):
        ranks = {name: entry.rank for name, entry in plan.matrices.items() if entry.rank}
        assert {name: model.get_submodule(name).rank for name in ranks} == ranks
        return
    for name, layer in encoder_layers(model).items():
        (attention,) = (part for part in layer.modules() if isinstance(part, ResizedAttention))
        kept = next(entry for key, entry in plan.layers.items() if name.endswith(key))
        assert attention.heads == kept.heads and not attention.nested
        if kept.heads:
            sizes = attention.score_size, attention.value_size
            assert sizes == (kept.score_size, kept.value_size)


@pytest.mark.slow
@every_form
def test_a_folder_loads_at_each_of_its_sizes(family, units, tmp_path):
    """The largest without a word; each is a plain model, saved and loaded as one, fused as one."""
    model, plan = nested(family, units=units)
    save(model, None, tmp_path / "nested")
    sizes = []
    for fraction in (None, *FRACTIONS):
        arguments = {} if fraction is None else {"encoder_fraction": fraction}
        loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "nested", **arguments
        )
        expected = logits_at(model, fraction or FRACTIONS[0])
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        assert not fractions_of(loaded) and not hasattr(loaded.config, "encoder_fraction")
        assert torch.equal(
            logits(load_model(str(tmp_path / "nested"), **arguments)), logits(loaded)
        )
        assert load_encoder(str(tmp_path / "nested"), **arguments).num_parameters() < (
            loaded.num_parameters()
        )
        save(loaded, None, tmp_path / "plain")
        config = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert "encoder_fraction" not in config and config["quantization_config"]["version"] == 2
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
        assert torch.equal(logits(plain), logits(loaded))
        check_sizes(plain, plan.at(fraction or FRACTIONS[0]))
        torch.testing.assert_close(logits(fuse_(loaded)), expected, rtol=1e-4, atol=1e-4)
        sizes.append(count_parameters(plain)["encoder"])
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


@every_units
def test_a_headless_model_loads_at_each_size(units, tmp_path):
    model, _ = nested(units=units)
    save(model.base_model, None, tmp_path / "headless")
    batch = tiny_batch()
    del batch["labels"]
    for fraction in FRACTIONS:
        loaded = AutoModel.from_pretrained(tmp_path / "headless", encoder_fraction=fraction)
        use_size_(model, fraction)
        with torch.no_grad():
            found, expected = (m(**batch).last_hidden_state for m in (loaded, model.base_model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_units
def test_sizes_that_contradict_each_other_are_refused(units, tmp_path):
    """Attention of one size, its linear layers of another, in the smaller size alone."""
    save(nested(units=units)[0], None, tmp_path / "nested")
    file = tmp_path / "nested" / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    if units == "matrices":
        modules["bert.encoder.layer.0.output.dense"]["ranks"]["0.25"] = 10**6
        message = "malformed"
    else:
        modules["bert.encoder.layer.0.attention.self"]["attention"]["0.25"][1] = 1
        message = "another size than its"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "nested"), encoder_fraction=0.25)


@every_units
def test_all_sizes_come_back_equal(units, tmp_path):
    model, _ = nested(units=units)
    save(model, None, tmp_path / "nested")
    loaded = load_model(str(tmp_path / "nested"), encoder_fraction=ALL)
    assert fractions_of(loaded) == FRACTIONS
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    again = load_model(str(tmp_path / "again"), encoder_fraction=0.25)
    torch.testing.assert_close(logits(again), logits_at(model, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.3, 1, "0.4", True])
def test_a_size_that_is_not_there_is_refused(fraction, tmp_path):
    save(nested()[0], None, tmp_path / "nested")
    for load in (AutoModel.from_pretrained, load_model, load_encoder):
        with pytest.raises(UserError, match=r"this model has the sizes 0\.7, 0\.4, 0\.25"):
            load(str(tmp_path / "nested"), encoder_fraction=fraction)


def test_a_folder_of_one_size_has_no_others(tmp_path):
    model = tiny_model("bert")
    decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    save(model, None, tmp_path / "plain")
    with pytest.raises(UserError, match="has one size only"):
        load_model(str(tmp_path / "plain"), encoder_fraction=0.4)
    with pytest.raises(UserError, match="has one size only"):
        take_size_(model, 0.4)


@every_units
def test_what_is_of_one_size_refuses_several(units):
    model = nested(units=units)[0]
    for refuses in (
        fuse_,
        dense,
        lambda model: export(model, tiny_tokenizer(), "nowhere", "torch-export"),
    ):
        with pytest.raises(UserError, match="several sizes"):
            refuses(model)


@pytest.mark.parametrize("units", ("matrices", "structured"))
@pytest.mark.parametrize(
    "wrong", ("bert.pooler.x", "bert.embeddings.LayerNorm", "bert.embeddings.word_embeddings")
)
def test_entries_of_other_modules_are_refused(units, wrong, tmp_path):
    save(nested(units=units)[0], None, tmp_path / "nested")
    file = tmp_path / "nested" / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    for name in [name for name in modules if name.endswith(("query", "attention.self"))][:2]:
        changed = copy.deepcopy(config)
        changed["quantization_config"]["modules"][wrong] = modules[name]
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=wrong):
            load_model(str(tmp_path / "nested"))


def test_a_nested_layer_is_its_parts():
    torch.manual_seed(3)
    large = LowRankLinear(9, 13, 7)
    small = LowRankLinear(9, 13, 3)
    with torch.no_grad():
        small.down.copy_(large.down[:3]), small.up.copy_(large.up[:, :3])
    layer = NestedLinear.of({0.5: large, 0.2: small})
    x = torch.randn(2, 5, 9)
    for fraction, part in ((0.5, large), (0.2, small)):
        layer.fraction = fraction
        torch.testing.assert_close(layer(x), part(x))
        assert torch.equal(layer.at(fraction)(x), part(x))
