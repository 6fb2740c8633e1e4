"""One folder of several sizes: each is what was trained, saved or decomposed at that size alone."""

import copy
import itertools
import json

import pytest
import torch
from cases import trainer_for
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from bert_decomp import DecompositionConfig, UserError, decompose_, fuse_
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.distillation.resumable import fit
from bert_decomp.exporting.dense import dense
from bert_decomp.exporting.export import export
from bert_decomp.models.architectures import encoder_layers
from bert_decomp.models.loading import count_parameters, load_encoder, load_model
from bert_decomp.models.nested import (
    ALL,
    Nested,
    NestedLinear,
    fractions_of,
    take_size_,
    use_size_,
)
from bert_decomp.models.nested_resized import NestedResized
from bert_decomp.models.resized import ResizedAttention
from bert_decomp.models.saving import LowRankConfig, save
from bert_decomp.planning import RankPlan
from bert_decomp.planning.blocks import BlockPlan
from lowrank_kernels import LowRankLinear

FRACTIONS = (0.7, 0.4, 0.25)
every_family = pytest.mark.parametrize("family", ("bert", "distilbert", "mpnet", "modernbert"))


def nested(family="bert", method="coupled", units="matrices"):
    """A nested model, and its plan."""
    model = tiny_model(family)
    options = {"min_rank": 1} if units == "matrices" else {}
    config = DecompositionConfig(method, nested_fractions=list(FRACTIONS), units=units, **options)
    plan = decompose_(model, config, [tiny_batch(20, 13)], progress=False)
    return model.eval(), plan


every_form = pytest.mark.parametrize(
    ("family", "units"),
    [
        *((family, "matrices") for family in ("bert", "distilbert", "mpnet", "modernbert")),
        *((family, "structured") for family in ("bert", "distilbert", "mpnet")),
    ],
)
every_units = pytest.mark.parametrize("units", ("matrices", "structured"))


@torch.no_grad()
def logits(model):
    batch = tiny_batch()
    del batch["labels"]
    return model(**batch).logits


@torch.no_grad()
def logits_at(model, fraction):
    use_size_(model, fraction)
    return logits(model)


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


@pytest.mark.parametrize("family", ("bert", "distilbert", "mpnet"))
def test_the_largest_structure_is_what_it_is_alone(family):
    """Its coordinates are only turned."""
    model, plan = nested(family, units="structured")
    alone = tiny_model(family)
    config = DecompositionConfig(encoder_fraction=0.7, units="structured")
    decompose_(alone, config, [tiny_batch(20, 13)], plan=plan.at(0.7), progress=False)
    torch.testing.assert_close(logits(model), logits(alone.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ("bert", "distilbert", "mpnet"))
def test_a_smaller_structure_is_the_largest_masked(family):
    """What it lacks is zero in the largest, but for the output biases, which take over its mean."""
    model, _ = nested(family, units="structured")
    for place, fraction in enumerate(FRACTIONS):
        masked = take_size_(copy.deepcopy(model), FRACTIONS[0])
        for name, module in model.named_modules():
            if not isinstance(module, NestedResized):
                continue
            rows, columns = (kept.indices() for kept in module.sizes[fraction])
            linear = masked.get_submodule(name)
            with torch.no_grad():
                if len(columns) < module.in_features:
                    gone = torch.ones(module.in_features, dtype=torch.bool)
                    gone[columns] = False
                    linear.weight[:, gone] = 0
                    linear.bias.copy_(module.biases[place])
                if len(rows) < module.out_features:
                    gone = torch.ones(module.out_features, dtype=torch.bool)
                    gone[rows] = False
                    linear.weight[gone] = 0
                    linear.bias[gone] = 0
        torch.testing.assert_close(logits_at(model, fraction), logits(masked), rtol=1e-4, atol=1e-5)


def test_structure_in_several_sizes_is_not_for_every_family():
    with pytest.raises(UserError, match="use units='matrices'"):
        nested("modernbert", units="structured")


def resized_entry(**changes):
    whole, half = [[[0, 1], 3, 3], [[0], 4, 4]], [[[1], 3, 2], [[0], 4, 4]]
    entry = {"in_features": 4, "out_features": 6, "scaled": False}
    return {**entry, "sizes": {"0.5": whole, "0.25": half}, **changes}


def attention_entry(smaller):
    return {"attention": {"0.5": [[0, 2], 4, 5], "0.25": smaller}}


SIDE = [[0], 4, 4]


@pytest.mark.parametrize(
    "entry",
    [
        {"ranks": {"0.5": 4, "0.25": 5}, "bias": True},
        {"ranks": {"0.5": 4}, "bias": True},
        {"ranks": {"0.5": 4, "0.25": 0}, "bias": True},
        {"ranks": {"0.5": 4, "x": 1}, "bias": True},
        {"ranks": {"0.5": 4, "nan": 1}, "bias": True},
        {"ranks": {"0.5": 4, "1.5": 9}, "bias": True},
        {"ranks": {"0.5": 4, "0.50": 4}, "bias": True},
        {"ranks": [4, 2], "bias": True},
        {"ranks": {"0.5": True, "0.25": True}, "bias": True},
        {"ranks": {"0.5": 4, "0.2": 2}, "bias": True},
        resized_entry(scaled=1),
        resized_entry(out_features=7),
        resized_entry(in_features=0),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE]}),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE], "0.25": [[[2], 3, 3], SIDE]}),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE], "0.25": [[[0], 3, 4], SIDE]}),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE], "0.25": [[[1, 0], 3, 3], SIDE]}),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE], "0.25": [[[-1], 3, 3], SIDE]}),
        resized_entry(sizes={"0.5": [[[0, 1], 3, 3], SIDE], "0.25": [SIDE]}),
        attention_entry([[1], 4, 4]),
        attention_entry([[0], 5, 4]),
        attention_entry([[0], 0, 4]),
        attention_entry([[0], 4]),
        attention_entry("all"),
    ],
)
def test_malformed_entries_are_refused(entry):
    """Beside a right one."""
    right = {"ranks": {"0.5": 4, "0.25": 2}, "bias": True}
    assert LowRankConfig({"a": right, "b": resized_entry()}).fractions == (0.5, 0.25)
    with pytest.raises(UserError, match="malformed low-rank entry"):
        LowRankConfig({"a": right, "b": entry})


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


@every_units
def test_plans_are_nested_and_within_their_sizes(units):
    _, plan = nested(units=units)
    assert plan.fractions == FRACTIONS
    for fraction in FRACTIONS:
        assert fraction - 0.1 < plan.at(fraction).encoder_fraction <= fraction
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    if units == "matrices":
        for matrix in plan.matrices.values():
            ranks = [matrix.rank or 0, *matrix.smaller_ranks]
            assert ranks == sorted(ranks, reverse=True)
        return
    for larger, smaller in itertools.pairwise(plan.nested.values()):
        assert all(entry.within(larger[name]) for name, entry in smaller.items())


def test_a_plan_of_blocks_with_wrong_sizes_is_refused():
    value = nested(units="structured")[1].to_dict()
    name = next(iter(value["layers"]))
    for change, message in (
        ({"fractions": [0.7]}, "two or more"),
        ({"fractions": [0.7, 0.4]}, "not as many smaller sizes"),
        ({"smaller": value["smaller"][:1]}, "not as many smaller sizes"),
        ({"smaller": value["smaller"][::-1]}, "keeps more"),
        ({"smaller": [{}, {}]}, "no layers"),
        ({"smaller": [{"x": value["layers"][name]}] * 2}, "other layers"),
    ):
        with pytest.raises(UserError, match=message):
            BlockPlan.from_dict({**value, **change})


def test_a_plan_file_with_wrong_sizes_is_refused():
    value = nested()[1].to_dict()
    name = next(name for name, matrix in value["matrices"].items() if matrix["rank"])
    for change, message in (
        ({"fractions": [0.7]}, "two or more"),
        ({"fractions": [0.7, 0.4, 0.4]}, "do not fall"),
        ({"fractions": [0.7, 0.4, "a"]}, "shares between"),
        ({"fractions": [0.7, 0.4]}, "has not 1 smaller_ranks"),
    ):
        with pytest.raises(UserError, match=message):
            RankPlan.from_dict({**value, **change})
    for ranks in ([1, 99], [99, 1], [1, True], [1, 0], 3):
        changed = copy.deepcopy(value)
        changed["matrices"][name]["smaller_ranks"] = ranks
        with pytest.raises(UserError, match="smaller_ranks"):
            RankPlan.from_dict(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested_fractions": [0.5]}, "two shares or more"),
        ({"nested_fractions": [0.5, 0.5]}, "two shares or more"),
        ({"nested_fractions": [1.5, 0.5]}, "two shares or more"),
        ({"nested_fractions": [0.5, 0.2], "encoder_fraction": 0.5}, "both set the size"),
        ({"nested_fractions": [0.5, 0.2], "anchored": True}, "anchored fits"),
        ({"nested_fractions": [0.5, 0.2], "units": "mixed"}, "units='matrices' or 'structured'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DecompositionConfig(**options)


def gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    return loss.detach(), {
        name: parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


@every_units
def test_training_follows_the_mean_over_the_sizes(units, tmp_path):
    """Of the losses and, through what they share, of the gradients of the plain models."""
    model, _ = nested(units=units)
    terms = PRESETS["best"].without_unit_terms() if units == "structured" else PRESETS["best"]
    alone = {f: take_size_(copy.deepcopy(model), f) for f in FRACTIONS}
    batch, found = tiny_batch(7), {}
    for name, student in (("nested", model), *alone.items()):
        trainer = trainer_for(tmp_path, tiny_tokenizer(), student=student, terms=terms)
        found[name] = gradients(trainer, batch)
        trainer.close()
    loss, shared = found.pop("nested")
    torch.testing.assert_close(loss, torch.stack([each for each, _ in found.values()]).mean())
    expected = {name: torch.zeros_like(value) for name, value in shared.items()}
    for place, (fraction, (_, own)) in enumerate(found.items()):
        for name, value in own.items():
            owner, _, kind = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, NestedResized):
                rows, columns = (kept.indices() for kept in module.sizes[fraction])
                if kind == "bias":
                    expected[f"{owner}.biases"][place, rows] += value / 3
                else:
                    expected[name][rows[:, None], columns] += module.scale(fraction) * value / 3
            elif isinstance(module, NestedLinear):
                rank = module.ranks[fraction]
                if kind == "bias":
                    expected[f"{owner}.biases"][place] += value / 3
                elif kind == "down":
                    expected[name][:rank] += value / 3
                else:
                    expected[name][:, :rank] += value / 3
            else:
                expected[name] += value / 3
    for name, value in shared.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
    assert {m.fraction for m in model.modules() if isinstance(m, Nested)} == {FRACTIONS[0]}


@every_units
def test_a_resumed_training_is_an_uninterrupted_one(units, tmp_path):
    student, states = nested(units=units)[0], []
    for name, ends in (("whole", (7,)), ("parts", (5, 7))):
        for end in ends:
            trainer = trainer_for(
                tmp_path / name,
                tiny_tokenizer(),
                student=copy.deepcopy(student),
                terms=PRESETS["light"],
                max_steps=end,
                lr_scheduler_type="constant",
            )
            fit(trainer)
            trainer.close()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    before = student.state_dict()
    assert not any(
        torch.equal(before[name], value) for name, value in states[0].items() if "biases" in name
    )


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
