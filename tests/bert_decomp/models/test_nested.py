"""One folder of several sizes: each is what was trained, saved or decomposed at that size alone."""

import copy
import json

import pytest
import torch
from cases import trainer_for
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from bert_decomp import DecompositionConfig, UserError, decompose_, fuse_
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.distillation.resumable import fit
from bert_decomp.models.loading import count_parameters, load_encoder, load_model
from bert_decomp.models.nested import (
    ALL,
    NestedLinear,
    fractions_of,
    take_size_,
    use_size_,
)
from bert_decomp.models.saving import LowRankConfig, save
from bert_decomp.planning import RankPlan
from lowrank_kernels import LowRankLinear

FRACTIONS = (0.7, 0.4, 0.25)
every_family = pytest.mark.parametrize("family", ("bert", "distilbert", "mpnet", "modernbert"))


def nested(family="bert", method="coupled"):
    """A nested model, and its plan."""
    model = tiny_model(family)
    config = DecompositionConfig(method, nested_fractions=list(FRACTIONS), min_rank=1)
    plan = decompose_(model, config, [tiny_batch(20, 13)], progress=False)
    return model, plan


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


@every_family
def test_a_folder_loads_at_each_of_its_sizes(family, tmp_path):
    """The largest without a word; each is a plain model, saved and loaded as one, fused as one."""
    model, plan = nested(family)
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
        ranks = plan.at(fraction or FRACTIONS[0]).matrices
        assert {name: plain.get_submodule(name).rank for name in ranks if ranks[name].rank} == {
            name: entry.rank for name, entry in ranks.items() if entry.rank
        }
        torch.testing.assert_close(logits(fuse_(loaded)), expected, rtol=1e-4, atol=1e-4)
        sizes.append(count_parameters(plain)["encoder"])
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


def test_a_headless_model_loads_at_each_size(tmp_path):
    model, _ = nested()
    save(model.base_model, None, tmp_path / "headless")
    batch = tiny_batch()
    del batch["labels"]
    for fraction in FRACTIONS:
        loaded = AutoModel.from_pretrained(tmp_path / "headless", encoder_fraction=fraction)
        use_size_(model, fraction)
        with torch.no_grad():
            found, expected = (m(**batch).last_hidden_state for m in (loaded, model.base_model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_all_sizes_come_back_equal(tmp_path):
    model, _ = nested()
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


def test_what_is_of_one_size_refuses_several():
    with pytest.raises(UserError, match="several sizes"):
        fuse_(nested()[0])


@pytest.mark.parametrize(
    "modules",
    [
        {"a": {"ranks": {"0.5": 4, "0.25": 5}, "bias": True}},
        {"a": {"ranks": {"0.5": 4}, "bias": True}},
        {"a": {"ranks": {"0.5": 4, "0.25": 0}, "bias": True}},
        {"a": {"ranks": {"0.5": 4, "x": 1}, "bias": True}},
        {"a": {"ranks": {"0.5": 4, "1.5": 9}, "bias": True}},
        {"a": {"ranks": {"0.5": 4, "0.50": 4}, "bias": True}},
        {"a": {"ranks": [4, 2], "bias": True}},
        {"a": {"ranks": {"0.5": True, "0.25": True}, "bias": True}},
        {
            "a": {"ranks": {"0.5": 4, "0.25": 2}, "bias": True},
            "b": {"ranks": {"0.5": 4, "0.2": 2}, "bias": True},
        },
    ],
)
def test_malformed_entries_are_refused(modules):
    with pytest.raises(UserError, match="malformed low-rank entry"):
        LowRankConfig(modules)


def test_plans_are_nested_and_within_their_sizes():
    _, plan = nested()
    assert plan.fractions == FRACTIONS
    for fraction in FRACTIONS:
        assert fraction - 0.1 < plan.at(fraction).encoder_fraction <= fraction
    for matrix in plan.matrices.values():
        ranks = [matrix.rank or 0, *matrix.smaller_ranks]
        assert ranks == sorted(ranks, reverse=True)
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


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
        ({"nested_fractions": [0.5, 0.2], "units": "mixed"}, "units='matrices' only"),
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


def test_training_follows_the_mean_over_the_sizes(tmp_path):
    """Of the losses and, through what they share, of the gradients of the plain models."""
    model, _ = nested()
    alone = {f: take_size_(copy.deepcopy(model), f) for f in FRACTIONS}
    batch = tiny_batch(7)
    found = {}
    for name, student in (("nested", model), *alone.items()):
        trainer = trainer_for(tmp_path, tiny_tokenizer(), student=student, terms=PRESETS["best"])
        found[name] = gradients(trainer, batch)
        trainer.close()
    loss, shared = found.pop("nested")
    torch.testing.assert_close(loss, torch.stack([each for each, _ in found.values()]).mean())
    for name, module in model.named_modules():
        if not isinstance(module, NestedLinear):
            continue
        down, up = torch.zeros_like(module.down), torch.zeros_like(module.up)
        for place, (fraction, (_, own)) in enumerate(found.items()):
            rank = module.ranks[fraction]
            down[:rank] += own[f"{name}.down"] / 3
            up[:, :rank] += own[f"{name}.up"] / 3
            torch.testing.assert_close(
                shared[f"{name}.biases"][place], own[f"{name}.bias"] / 3, rtol=1e-3, atol=1e-6
            )
        torch.testing.assert_close(shared[f"{name}.down"], down, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(shared[f"{name}.up"], up, rtol=1e-3, atol=1e-6)
        assert module.fraction == FRACTIONS[0]


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path):
    student, states = nested()[0], []
    for name, ends in (("whole", (7,)), ("parts", (5, 7))):
        for end in ends:
            trainer = trainer_for(
                tmp_path / name,
                tiny_tokenizer(),
                student=copy.deepcopy(student),
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
