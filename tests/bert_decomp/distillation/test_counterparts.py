"""A student with other heads or neurons computes its counterparts of what its teacher does, where it reads the same."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import resized, trainer_for
from nested_cases import FRACTIONS, nested
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model, tiny_tokenizer

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.decomposition.structure import apply_blocks_
from bert_decomp.distillation.counterparts import ATTENTION, Counterparts, affine
from bert_decomp.distillation.features import FEATURES, FeatureCapture, Masks
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.models.architectures import FAMILIES, encoder_layers
from bert_decomp.models.nested import use_size_
from bert_decomp.models.selection import select_linears
from bert_decomp.planning.blocks import BlockPlan, LayerPlan
from bert_decomp.statistics import collect_statistics
from bert_decomp.units import layers_of

LINEAR = ("query", "key", "value", "ffn_intermediate")
EVERY = set(FEATURES)


def linears(model, part):
    name = getattr(FAMILIES[model.config.model_type], part)
    return [layer.get_submodule(name) for layer in encoder_layers(model).values()]


@torch.no_grad()
def assert_linears_agree(student, teacher, features=LINEAR, tolerance=1e-5):
    """Fed the same states, the student's layers answer what is mapped of the teacher's; says how many were mapped."""
    counterparts, mapped = Counterparts(student, teacher, EVERY), 0
    joint = FAMILIES[student.config.model_type].query == FAMILIES[student.config.model_type].key
    for part in features:
        for index, (small, dense) in enumerate(
            zip(linears(student, part), linears(teacher, part), strict=True)
        ):
            found = counterparts._maps.get((part, index))
            if found is None:
                continue
            x = torch.randn(2, 7, dense.in_features)
            got, wanted = small(x), dense(x)
            if joint and part != "ffn_intermediate":
                third = LINEAR.index(part)
                got, wanted = got.chunk(3, -1)[third], wanted.chunk(3, -1)[third]
            error = (found(wanted) - got).norm() / got.norm()
            assert error < tolerance, (part, index, float(error))
            mapped += 1
    return mapped


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_a_student_as_the_decomposition_makes_it_agrees_exactly(family):
    """Layer 0 has fewer, smaller heads (ModernBERT's are whole), layer 1 no neurons, layer 2 fewer of them."""
    student, teacher = resized(family), tiny_model(family)
    # Two factors on top of the neurons of layer 2 make theirs an approximation.
    features = LINEAR if family == "modernbert" else LINEAR[:3]
    assert assert_linears_agree(student, teacher, features) == (4 if family == "modernbert" else 3)
    counterparts = Counterparts(student, teacher, EVERY)
    without_heads = set() if family == "modernbert" else {(name, 1) for name in ATTENTION}
    assert counterparts.absent == without_heads | {("ffn_intermediate", 1)}


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_kept_neurons_are_found_under_factors_and_after_a_refit(family):
    teacher, batches = tiny_model(family), [tiny_batch(20, 13)]
    student = copy.deepcopy(teacher)
    config = DecompositionConfig(encoder_fraction=0.5, units="structured")
    plan = decompose_(student, config, batches, progress=False)
    statistics = collect_statistics(
        teacher, batches, select_linears(teacher), needs=("gradients",), progress=False
    )
    found, checked = Counterparts(student, teacher, {"ffn_intermediate"}), 0
    for index, layer in enumerate(layers_of(teacher, statistics)):
        count = plan.layers[layer.name].neurons
        if not 0 < count < layer.sizes.neurons:
            continue
        kept = layer.unit("neurons").order[:count].sort().values
        numbers = torch.arange(len(affine(linears(teacher, "ffn_intermediate")[index])[0]))
        expected = torch.cat([kept, kept + layer.sizes.neurons]) if layer.sizes.gated else kept
        mapped = found._maps["ffn_intermediate", index](numbers[None])[0]
        # Tied directions and a refit may exchange a few.
        assert (mapped == expected).float().mean() > 0.9
        checked += 1
    assert checked


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_every_size_of_a_nested_student_agrees(family):
    teacher, (student, plan) = tiny_model(family), nested(family, units="structured")
    for fraction in FRACTIONS:
        use_size_(student, fraction)
        if fraction == FRACTIONS[0]:
            # Of the others, what a smaller size keeps is fitted by the refit of the largest.
            assert assert_linears_agree(student, teacher, ("value",), tolerance=0.5)
        for layer, entry in enumerate(plan.at(fraction).layers.values()):
            absent = Counterparts(student, teacher, EVERY).absent
            assert (("scores", layer) in absent) == (not entry.heads)
            assert (("ffn_intermediate", layer) in absent) == (not entry.neurons)


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_of_dropped_heads_the_others_have_no_loss_in_the_first_layer(family):
    """Its states are the teacher's, and heads do not see each other."""
    teacher, batch = tiny_model(family), tiny_batch()
    student = without_heads(family)
    counterparts = Counterparts(student, teacher, EVERY)
    recorded = []
    for model in (student, teacher):
        capture = FeatureCapture(model, EVERY)
        with torch.no_grad():
            model(**batch)
        recorded.append(capture.take())
        capture.close()
    of_student, of_teacher = recorded[0], counterparts.of(recorded[1])
    pairs = Masks(batch["attention_mask"], teacher.config).pairs(0)
    real = batch["attention_mask"].bool()
    for name in ATTENTION:
        got, wanted = of_student.get(name, 0), of_teacher.get(name, 0)
        if name == "scores":
            lowest = torch.finfo(torch.float32).min
            got, wanted = (x.masked_fill(~pairs, lowest).softmax(-1) for x in (got, wanted))
            got, wanted = (x.transpose(1, 2) for x in (got, wanted))
        torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-5)


def without_heads(family):
    model = tiny_model(family)
    statistics = collect_statistics(
        model, [tiny_batch(20, 13)], select_linears(model), needs=("gradients",), progress=False
    )
    layers = layers_of(model, statistics)
    plan = LayerPlan.dense(layers[0].sizes)
    plans = {layer.name: replace(plan, heads=(0, 2, 3)) for layer in layers}
    apply_blocks_(model, layers, BlockPlan(layers[0].sizes, plans))
    return model.eval()


@pytest.mark.parametrize("units", ["structured", "mixed"])
def test_a_student_with_other_heads_learns_every_term_that_has_a_counterpart(units, tmp_path):
    teacher = tiny_model("bert")
    student = copy.deepcopy(teacher)
    decompose_(
        student,
        DecompositionConfig(encoder_fraction=0.4, units=units),
        [tiny_batch(20, 13)],
        progress=False,
    )
    terms = PRESETS["paper"].of_counterparts()
    trainer = trainer_for(tmp_path, tiny_tokenizer(), student=student, teacher=teacher, terms=terms)
    batch = tiny_batch(7)
    trainer.compute_loss(student.train(), dict(batch)).backward()
    assert set(trainer._term_sums) == set(terms.terms)
    trainer.close()
