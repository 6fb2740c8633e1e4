"""``units`` from the configuration: budgets, plan files, refit, training, the inference form and export."""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
from cases import layers_of_tiny, trainer_for
from optional import needs
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from bert_decomp import DecompositionConfig, UserError, decompose_, export, fuse_, save, unfuse_
from bert_decomp.decomposition import drift
from bert_decomp.decomposition.drift import _Moments, refit_
from bert_decomp.decomposition.structure import apply_blocks_
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.models.architectures import FAMILIES, encoder_layers
from bert_decomp.models.selection import select_linears
from bert_decomp.planning.blocks import BlockPlan, LayerPlan
from bert_decomp.statistics import collect_statistics, token_weights
from bert_decomp.units import Matrix, layers_of

RESIZABLE = [family for family in FAMILY_SIZES if family != "modernbert"]
BATCHES = [tiny_batch(20, 13)]
BATCH = {name: value for name, value in tiny_batch().items() if name != "labels"}


def decomposed(model, **options):
    student = copy.deepcopy(model)
    config = DecompositionConfig(**options)
    return student, decompose_(student, config, BATCHES, progress=False)


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_only_one_layer_has_its_matrices_in_memory():
    first, second, *_ = layers_of_tiny("bert")
    held = [weakref.ref(matrix) for matrix in first.matrices.values()]
    assert all(matrix() is not None for matrix in held)
    assert len(list(second.matrices.values())) == len(held)
    assert all(matrix() is None for matrix in held)


def test_prepared_layers_stay_those_of_the_model_that_was_there():
    model = tiny_model("bert")
    statistics = collect_statistics(
        model, BATCHES, select_linears(model), needs=("gradients",), progress=False
    )
    layer, *_ = layers_of(model, statistics)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(matrix.weight.any() for matrix in layer.matrices.values())


@pytest.mark.parametrize("units", ["structured", "mixed"])
def test_budgets_of_every_kind_are_kept(units):
    model = tiny_model("bert")
    student, plan = decomposed(model, units=units, encoder_fraction=0.4)
    assert 0.3 < plan.encoder_fraction <= 0.4
    whole = sum(parameter.numel() for parameter in model.parameters())
    student, plan = decomposed(model, units=units, model_fraction=0.6)
    biases = sum(p.numel() for p in student.parameters() if p.ndim == 1)
    assert sum(p.numel() for p in student.parameters()) <= 0.6 * whole + biases
    student, plan = decomposed(model, units=units, flops_fraction=0.5, flops_seq_length=16)
    dense = len(plan.layers) * LayerPlan.dense(plan.sizes).flops(plan.sizes, 16)
    assert sum(layer.flops(plan.sizes, 16) for layer in plan.layers.values()) <= dense / 2


def test_a_drop_of_the_metric_is_a_budget():
    model = tiny_model("bert")
    config = DecompositionConfig(units="structured", max_drop=60.0)
    held_out = [tiny_batch(12)]
    plan = decompose_(copy.deepcopy(model), config, BATCHES, held_out=held_out, progress=False)
    assert plan.encoder_fraction < 0.98
    with pytest.raises(UserError, match="held_out"):
        decompose_(copy.deepcopy(model), config, BATCHES, progress=False)


@pytest.mark.slow
def test_a_latency_no_model_has_is_refused():
    model = tiny_model("bert")
    for latency, message in ((1e9, "dense model takes"), (1e-6, "no plan was found")):
        config = DecompositionConfig(
            units="structured", latency_ms=latency, latency_batch_size=1, latency_seq_length=7
        )
        with pytest.raises(UserError, match=message):
            decompose_(copy.deepcopy(model), config, BATCHES, progress=False)


def test_a_plan_file_of_blocks_is_applied(tmp_path):
    model = tiny_model("bert")
    student, plan = decomposed(model, units="structured", encoder_fraction=0.4, refit=False)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    again, same = decomposed(model, plan_file=str(tmp_path / "plan.json"), refit=False)
    assert same == plan
    assert torch.equal(logits(again), logits(student))
    with pytest.raises(UserError, match=r"sizes|layers of"):
        decomposed(tiny_model("bert", intermediate_size=58), plan_file=str(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"units": "heads"}, "unknown units"),
        ({"units": "mixed", "method": "svd"}, "coupled"),
        ({"units": "structured", "rank": 5}, "rank goes with"),
        ({"units": "structured", "anchored": True}, "anchored goes with"),
        ({"units": "structured", "include": ["*query"]}, "include goes with"),
        ({"refit": True}, "refit goes with"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DecompositionConfig(**options)


def test_architectures_that_do_not_allow_it_are_refused_by_name():
    with pytest.raises(UserError, match="structured"):
        decomposed(tiny_model("modernbert"), units="mixed", encoder_fraction=0.5)
    with pytest.raises(UserError, match="already"):
        student, _ = decomposed(tiny_model("bert"), units="structured", encoder_fraction=0.5)
        decomposed(student, units="structured", encoder_fraction=0.5)


@pytest.mark.parametrize("family", RESIZABLE)
def test_refitting_the_dense_model_changes_nothing(family):
    model = tiny_model(family)
    student, layers = copy.deepcopy(model), layers_of_tiny(family)
    plan = BlockPlan(layers[0].sizes, {layer.name: layer.dense() for layer in layers})
    refit_(student, model, layers, plan, BATCHES, progress=False)
    torch.testing.assert_close(logits(student), logits(model), atol=1e-4, rtol=1e-4)


def first_sums(model):
    """What the first layer normalises after attention, real tokens only (tokens, width)."""
    family, layer = FAMILIES[model.config.model_type], next(iter(encoder_layers(model).values()))
    sums = []
    handle = layer.get_submodule(family.attention_norm).register_forward_pre_hook(
        lambda _module, args: sums.append(args[0])
    )
    inputs = {name: value for name, value in BATCHES[0].items() if name != "labels"}
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return sums[0][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("family", RESIZABLE)
@pytest.mark.parametrize("units", ["structured", "mixed"])
def test_the_refit_brings_the_first_sum_nearer(family, units):
    # Before the first output matrix nothing has drifted, so there the weighted error itself must fall.
    model = tiny_model(family)
    before, plan = decomposed(model, units=units, encoder_fraction=0.3, refit=False)
    after = copy.deepcopy(before)
    refit_(after, model, layers_of_tiny(family), plan, BATCHES, progress=False)
    name = f"{next(iter(encoder_layers(model)))}.{FAMILIES[family].attention_output}"
    output = {name: model.get_submodule(name)}
    weights = token_weights(model, BATCHES, output, progress=False)[name][0].sqrt()
    errors = [
        float((weights[:, None] * (first_sums(student) - first_sums(model)).square()).sum())
        for student in (after, before)
    ]
    assert errors[0] < errors[1]


def test_tokens_count_by_the_norm_of_their_gradient(monkeypatch):
    # With a head less in the first layer its output matrix alone has something to make up for, so no other weights of
    # the tokens come nearer by these.
    model, layers = tiny_model("bert"), layers_of_tiny("bert")
    sizes = layers[0].sizes
    plans = {layer.name: layer.dense() for layer in layers}
    plans[layers[0].name] = replace(layers[0].dense(), heads=tuple(range(1, sizes.heads)))
    plan = BlockPlan(sizes, plans)
    student = copy.deepcopy(model)
    apply_blocks_(student, layers, plan)
    name = f"{layers[0].name}.{layers[0].family.attention_output}"
    output = {name: model.get_submodule(name)}
    norms = token_weights(model, BATCHES, output, progress=False)[name][0].sqrt()

    def error(power):
        monkeypatch.setattr(
            drift,
            "token_weights",
            lambda *args, **options: {
                name: [weights**power for weights in batches]
                for name, batches in token_weights(*args, **options).items()
            },
        )
        refitted = copy.deepcopy(student)
        refit_(refitted, model, layers, plan, BATCHES, ridge=1e-9, progress=False)
        squares = (first_sums(refitted) - first_sums(model)).square()
        return float((norms[:, None] * squares).sum())

    assert error(1) < min(error(0), error(2))


def test_refitted_factors_are_the_best_of_their_rank():
    random = torch.Generator().manual_seed(0)
    states, weights = torch.randn(300, 7, generator=random), torch.rand(300, generator=random)
    targets = states @ torch.randn(7, 9, generator=random) + torch.randn(300, 9, generator=random)
    root = torch.randn(9, 9, generator=random).double()
    before = Matrix(
        torch.randn(9, 7, generator=random).double(),
        None,
        torch.eye(7).double(),
        root @ root.T,
        torch.zeros(7).double(),
        1.0,
    )
    moments = _Moments()
    for part in (slice(0, 100), slice(100, 300)):
        moments.add(states[part], targets[part], weights[part])
    after = moments.refit(before, 1e-9)
    outputs, share = after.metric().outputs, weights.double() / weights.sum()

    def loss(down, up, bias):
        errors = targets.double() - states.double() @ down.T @ up.T - bias
        return float((share[:, None] * (errors @ outputs) * errors).sum())

    down, up, bias = after.factors(3)
    best = loss(down, up, bias)
    own_down, own_up, own_bias = before.factors(3)
    assert best < loss(own_down, own_up, own_bias)
    for _ in range(20):
        moved = [x + 1e-2 * torch.randn(x.shape, generator=random) for x in (down, up, bias)]
        assert best < loss(*moved)


@pytest.mark.parametrize("family", FAMILY_SIZES)
@pytest.mark.parametrize("units", ["structured", "mixed"])
def test_the_inference_form_gives_the_same_logits(family, units):
    if family == "modernbert":
        units = "matrices" if units == "mixed" else units
    model = tiny_model(family)
    student, _ = decomposed(model, units=units, encoder_fraction=0.3)
    expected = logits(student)
    if family == "modernbert" and units == "structured":
        with torch.no_grad():
            torch.testing.assert_close(logits(fuse_(student)), expected, atol=1e-5, rtol=1e-4)
        return
    for unpad in (True, False):
        torch.testing.assert_close(logits(fuse_(student, unpad)), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(logits(unfuse_(student)), expected)


@pytest.mark.parametrize("family", RESIZABLE)
def test_the_inference_form_of_dropped_blocks(family):
    model, layers = tiny_model(family), layers_of_tiny(family)
    sizes = layers[0].sizes
    dense = LayerPlan.dense(sizes)
    plans = {layer.name: dense for layer in layers}
    names = list(plans)
    plans[names[1]] = LayerPlan((), 9, 9, 57)
    plans[names[2]] = LayerPlan((1, 3), 4, 7, 0)
    apply_blocks_(model, layers, BlockPlan(sizes, plans))
    expected = logits(model)
    torch.testing.assert_close(logits(fuse_(model)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("units", ["structured", "mixed"])
def test_a_loaded_model_trains_with_the_preset_light(units, tmp_path):
    teacher = tiny_model("bert")
    student, _ = decomposed(teacher, units=units, encoder_fraction=0.4)
    save(student, None, tmp_path / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    trainer = trainer_for(
        tmp_path / "run",
        tiny_tokenizer(),
        terms=PRESETS["light"],
        student=loaded,
        teacher=teacher,
        max_steps=3,
    )
    trainer.train()
    trainer.close()
    moved = [name for name, value in loaded.state_dict().items() if not value.equal(before[name])]
    for layer in encoder_layers(loaded):
        assert any(name.startswith(layer) for name in moved)


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_a_structured_model_exports(family, tmp_path):
    depth = 2 if family == "modernbert" else 1  # its attention alternates
    model = tiny_model(family, num_hidden_layers=depth)
    student, _ = decomposed(model, units="structured", encoder_fraction=0.4)
    texts = ["the red cat sees a dog", "a dog", "the owl is blue", "the hen sees the cow"]
    worst, same = export(student, tiny_tokenizer(), tmp_path / "model.onnx", texts=texts)
    assert worst < 1e-4 and same == 1.0
