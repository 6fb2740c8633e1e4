"""The distillation loss term by term, its features in every family, and training that resumes exactly."""

import copy

import pytest
import torch
from cases import resized, student_of, trainer_for, training_set
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.distillation.features import FEATURES, FeatureCapture, Masks
from bert_decomp.distillation.losses import (
    PRESETS,
    DistillationConfig,
    Weight,
    parse_terms,
)
from bert_decomp.distillation.resumable import fit
from bert_decomp.distillation.terms import (
    FEATURE_TERMS,
    attention_divergence,
    attention_rows,
    feature_losses,
    feature_sizes,
    spread,
    squared_error,
)
from bert_decomp.errors import UserError
from bert_decomp.kinds import SINGLE_LABEL

FAMILIES = sorted(FAMILY_SIZES)
# Every feature term, evenly over the three layers of the tiny models.
TERMS = {name: Weight(1.0).of_layers(3) for name in FEATURE_TERMS}


def features_of(model, batch, features=FEATURES):
    capture = FeatureCapture(model, set(features))
    outputs = model(**batch)
    capture.close()
    return capture.take(), outputs


def losses_of(student, teacher, batch, terms=TERMS):
    masks = Masks(batch["attention_mask"], teacher.config)
    of_student, of_teacher = features_of(student, batch)[0], features_of(teacher, batch)[0]
    sizes = feature_sizes([(of_teacher, masks)], terms)
    return feature_losses(of_student, of_teacher, masks, terms, sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_is_found_in_every_layer(family):
    model, batch = tiny_model(family), tiny_batch()
    features, _ = features_of(model, batch)
    width = features.get("hidden", 0).shape[-1]
    for layer in range(3):
        for name in (
            "query",
            "key",
            "value",
            "context",
            "attention_output",
            "ffn_output",
            "hidden",
        ):
            assert features.get(name, layer).shape == (5, 11, width), name
        assert features.get("scores", layer).shape == (5, 4, 11, 11)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_models_own_attention(family):
    """With their mask and softmax they are the probabilities that the model itself reports, positions and all."""
    model, batch = tiny_model(family), tiny_batch(rows=6, length=17)
    model.set_attn_implementation("eager")
    features, outputs = features_of(model, {**batch, "output_attentions": True})
    masks, rows = (
        Masks(batch["attention_mask"], model.config),
        batch["attention_mask"].bool()[:, None, :, None],
    )
    for layer, probabilities in enumerate(outputs.attentions):
        found = (
            features.get("scores", layer)
            .masked_fill(~masks.pairs(layer), torch.finfo(torch.float32).min)
            .softmax(-1)
        )
        torch.testing.assert_close(
            found.where(rows, 0), probabilities.where(rows, 0), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_equal_to_its_teacher_has_no_loss(family):
    model, batch = tiny_model(family), tiny_batch()
    losses = losses_of(model, model, batch)
    assert set(losses) == set(TERMS) and all(value == 0 for value in losses.values())
    logits = model(**batch).logits
    assert abs(SINGLE_LABEL.compare(logits, logits, 2.0)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_term(family):
    teacher, batch = tiny_model(family), tiny_batch()
    student = student_of(teacher)
    wider = {
        name: torch.nn.functional.pad(
            batch[name], (0, 7), value=0 if name == "attention_mask" else 1
        )
        for name in ("input_ids", "attention_mask")
    }
    values = []
    for inputs in (batch, wider):
        with torch.no_grad():
            values.append(
                losses_of(
                    student,
                    teacher,
                    {name: inputs[name] for name in ("input_ids", "attention_mask")},
                )
            )
    for name in TERMS:
        torch.testing.assert_close(values[0][name], values[1][name], rtol=1e-3, atol=1e-5)
        assert values[0][name] > 0


@pytest.mark.parametrize("term", sorted(TERMS))
def test_every_term_alone_has_a_gradient_in_the_factors(term):
    teacher = tiny_model("bert")
    student = student_of(teacher)
    losses_of(student, teacher, tiny_batch(), {term: TERMS[term]})[term].backward()
    assert student.bert.encoder.layer[0].attention.self.query.down.grad.abs().sum() > 0


def test_only_what_the_terms_need_is_kept():
    config = DistillationConfig({"attention_probabilities": 1.0, "logits": 1.0})
    features, _ = features_of(tiny_model("bert"), tiny_batch(), config.features)
    assert set(features.tensors) == {"query", "key"}
    assert DistillationConfig({"logits": 1.0, "task": 1.0}).features == set()


def test_attention_divergence_is_the_definition_and_ignores_what_is_masked():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, :, 3:] = mask[0, :, 3:] = False
    expected = []
    for row in range(2):
        real = 3 if row == 0 else 4
        p, q = (scores[row, :, :real, :real].softmax(-1) for scores in (teacher, student))
        expected += (p * (p / q).log()).sum(-1).flatten().tolist()
    assert attention_divergence(student, teacher, mask).item() == pytest.approx(
        sum(expected), rel=1e-5
    )
    assert attention_rows([(teacher, mask)]) == len(expected)
    hidden = ~mask.expand_as(student)
    student[hidden], teacher[hidden] = float("inf"), float("nan")
    assert attention_divergence(student, teacher, mask).item() == pytest.approx(
        sum(expected), rel=1e-5
    )


def test_weights_run_in_a_straight_line_and_are_shared_among_layers():
    terms = parse_terms("hidden=1@linear, logits=0.5..1,value=2e-1..0@last")
    assert [terms["logits"].at(progress) for progress in (0, 0.5, 1)] == [0.5, 0.75, 1]
    assert terms["hidden"].of_layers(3) == pytest.approx({0: 1 / 6, 1: 2 / 6, 2: 3 / 6})
    assert terms["value"].of_layers(3) == {2: 1.0} and terms["value"].at(0) == 0.2
    assert parse_terms(",".join(f"{name}={weight}" for name, weight in terms.items())) == terms
    teacher, batch = tiny_model("bert"), tiny_batch()
    student = student_of(teacher)
    alone = [
        losses_of(student, teacher, batch, {"hidden": {layer: 1.0}})["hidden"] for layer in range(3)
    ]
    shared = losses_of(student, teacher, batch, {"hidden": terms["hidden"].of_layers(3)})["hidden"]
    torch.testing.assert_close(shared, (alone[0] + 2 * alone[1] + 3 * alone[2]) / 6)


@pytest.mark.parametrize(
    "text",
    [
        "hidden",
        "hidden=",
        "hidden=x",
        "hidden=1..",
        "hidden=1@",
        "hidden=1@first",
        "=1",
        "hidden=-1",
        "hidden=1..-1",
        "hidden=1;logits=1",
        "hidden=1e999",
        "",
    ],
)
def test_malformed_terms_are_refused_in_one_line(text):
    with pytest.raises(UserError) as refusal:
        parse_terms(text)
    assert "\n" not in str(refusal.value)


def test_relative_error_is_the_definition_and_ignores_what_is_masked():
    student, teacher = torch.randn(3, 5, 7), 4 + torch.randn(3, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])[:, :, None]
    keep = mask.bool().expand_as(student)
    expected = (student[keep] - teacher[keep]).square().mean() / teacher[keep].var(correction=0)
    for padding in (1.0, float("inf"), float("nan")):
        student[~keep] = teacher[~keep] = padding
        # Whole, and in slices.
        for rows in ([3], [1, 2], [1, 1, 1]):
            size = spread(list(zip(teacher.split(rows), mask.split(rows), strict=True)))
            found = squared_error(student, teacher, mask) / size
            torch.testing.assert_close(found, expected)


def test_hooks_are_gone_after_close():
    model = tiny_model("bert")
    capture = FeatureCapture(model, set(FEATURES))
    capture.close()
    model(**tiny_batch())
    features = capture.take()
    assert not features.tensors and not features.positions


def test_bad_configurations_are_refused():
    for terms in (
        {"nothing": 1.0},
        {"hidden": -1.0},
        {"hidden": float("nan")},
        {"hidden": 0.0},
        {},
    ):
        with pytest.raises(UserError):
            DistillationConfig(terms)
    with pytest.raises(UserError):
        DistillationConfig(temperature=0)


def test_an_unknown_architecture_offers_hidden_states_and_logits():
    model = tiny_model("bert")
    model.config.model_type = "something-new"
    with pytest.raises(UserError, match="use distillation_preset light"):
        FeatureCapture(model, PRESETS["paper"].features)
    assert sorted(
        features_of(model, tiny_batch(), PRESETS["light"].features)[0].tensors["hidden"]
    ) == [0, 1, 2]


@pytest.mark.slow
def test_training_lowers_every_feature_term_and_leaves_the_teacher_alone(tmp_path, tokenizer):
    teacher = tiny_model("bert")
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_for(
        tmp_path,
        tokenizer,
        teacher=teacher,
        num_train_epochs=6,
        lr_scheduler_type="constant",
        learning_rate=3e-3,
    )
    fit(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss_hidden" in entry]
    for term in set(FEATURE_TERMS) & set(PRESETS["paper"].terms):
        assert logged[-1][f"loss_{term}"] < logged[0][f"loss_{term}"], term
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    "name,changes",
    [
        ("hidden_size", {"hidden_size": 40}),
        ("vocab_size", {"vocab_size": 70}),
        ("num_hidden_layers", {"num_hidden_layers": 2}),
        ("num_labels", {"num_labels": 2}),
    ],
)
def test_a_student_of_another_shape_is_refused(tmp_path, tokenizer, name, changes):
    with pytest.raises(UserError, match=f"differ in {name}"):
        trainer_for(
            tmp_path, tokenizer, student=tiny_model("bert", **changes), teacher=tiny_model("bert")
        )


def test_labels_out_of_range_are_refused(tmp_path, tokenizer):
    for wrong in (3, -1):
        data = training_set(4).map(
            lambda row, i, wrong=wrong: {"labels": wrong if i == 2 else 0}, with_indices=True
        )
        with pytest.raises(UserError, match=f"example 2 has the label {wrong}, .* 0 to 2"):
            trainer_for(tmp_path, tokenizer, data=data)


def test_terms_on_heads_that_the_student_lacks_are_refused(tmp_path, tokenizer):
    terms = DistillationConfig({"hidden": 1.0, "value": 1.0, "attention_scores": 1.0})
    with pytest.raises(UserError, match="drop the terms that need the same: attention_scores"):
        trainer_for(tmp_path, tokenizer, terms=terms, student=resized("bert"))
    student = resized("bert")
    trainer = trainer_for(
        tmp_path, tokenizer, terms=terms.of_counterparts(), student=student, max_steps=1
    )
    before = copy.deepcopy(student.state_dict())
    fit(trainer)
    trainer.close()
    assert not all(torch.equal(value, before[n]) for n, value in student.state_dict().items())
