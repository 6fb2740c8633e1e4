"""The distillation loss term by term, its features in every family, and training that resumes exactly."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments, set_seed

from bert_decomp.decompose import DecompositionConfig, decompose_
from bert_decomp.distil import (
    PRESETS,
    TERMS,
    DistillationConfig,
    DistillationTrainer,
    FeatureCapture,
    attention_scores,
    feature_losses,
    logits_loss,
    masked_error,
)
from bert_decomp.errors import UserError
from bert_decomp.training import fit, last_checkpoint

FAMILIES = sorted(FAMILY_SIZES)
FEATURES = set(TERMS) - {"logits", "task"}


def student_of(teacher, rank=7):
    student = copy.deepcopy(teacher)
    decompose_(student, DecompositionConfig("svd", rank=rank), progress=False)
    return student


def features_of(model, batch, terms=FEATURES):
    capture = FeatureCapture(model, set(terms))
    outputs = model(**batch)
    capture.close()
    return capture.take(), outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_is_found_in_every_layer(family):
    model, batch = tiny_model(family), tiny_batch()
    features, _ = features_of(model, batch)
    for name in FEATURES - {"attention_scores"}:
        assert sorted(features[name]) == [0, 1, 2], name
        assert all(tensor.shape[:2] == (5, 11) for tensor in features[name].values())
    width = features["hidden"][0].shape[-1]
    assert {features[name][0].shape[-1] for name in ("query", "key", "value", "context", "attention_output")} == {width}


def test_scores_are_those_of_the_models_own_attention():
    model, batch = tiny_model("bert", attn_implementation="eager"), tiny_batch()
    model.set_attn_implementation("eager")
    features, outputs = features_of(model, {**batch, "output_attentions": True})
    hidden = batch["attention_mask"][:, None, None, :] == 0
    for index, probabilities in enumerate(outputs.attentions):
        scores = attention_scores(features["query"][index], features["key"][index], 4)
        torch.testing.assert_close(scores.masked_fill(hidden, float("-inf")).softmax(-1), probabilities,
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_equal_to_its_teacher_has_no_loss(family):
    model, batch = tiny_model(family), tiny_batch()
    features, outputs = features_of(model, batch)
    losses = feature_losses(features, features, batch["attention_mask"], 4, FEATURES)
    assert set(losses) == FEATURES and all(value == 0 for value in losses.values())
    assert abs(logits_loss(outputs.logits, outputs.logits, 2.0, False)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_term(family):
    teacher, batch = tiny_model(family), tiny_batch()
    student = student_of(teacher)
    wider = {name: torch.nn.functional.pad(batch[name], (0, 7), value=0 if name == "attention_mask" else 1)
             for name in ("input_ids", "attention_mask")}
    values = []
    for inputs in (batch, wider):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            values.append(feature_losses(features_of(student, inputs)[0], features_of(teacher, inputs)[0],
                                         inputs["attention_mask"], 4, FEATURES))
    for name in FEATURES:
        torch.testing.assert_close(values[0][name], values[1][name], rtol=1e-3, atol=1e-5)
        assert values[0][name] > 0


@pytest.mark.parametrize("term", sorted(FEATURES))
def test_every_term_alone_has_a_gradient_in_the_factors(term):
    teacher, batch = tiny_model("bert"), tiny_batch()
    student = student_of(teacher)
    loss = feature_losses(features_of(student, batch, {term})[0], features_of(teacher, batch, {term})[0],
                          batch["attention_mask"], 4, {term})[term]
    loss.backward()
    assert student.bert.encoder.layer[0].attention.self.query.down.grad.abs().sum() > 0


def test_masked_error_is_the_definition_and_ignores_what_is_masked():
    student, teacher = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])[:, :, None]
    keep = mask.bool().expand_as(student)
    expected = (student[keep] - teacher[keep]).square().mean() / teacher[keep].var(correction=0)
    torch.testing.assert_close(masked_error(student, teacher, mask), expected)
    student[~keep], teacher[~keep] = float("inf"), float("nan")
    torch.testing.assert_close(masked_error(student, teacher, mask), expected)


def test_hooks_are_gone_after_close():
    model = tiny_model("bert")
    capture = FeatureCapture(model, FEATURES)
    capture.close()
    model(**tiny_batch())
    assert capture.take() == {}


def test_bad_configurations_are_refused():
    for terms in ({"nothing": 1.0}, {"hidden": -1.0}, {"hidden": float("nan")}, {"hidden": 0.0}, {}):
        with pytest.raises(UserError):
            DistillationConfig(terms)
    with pytest.raises(UserError):
        DistillationConfig(temperature=0)


def test_an_unknown_architecture_offers_hidden_states_and_logits():
    model = tiny_model("bert")
    model.config.model_type = "something-new"
    with pytest.raises(UserError, match="light"):
        FeatureCapture(model, set(PRESETS["paper"]))
    assert sorted(features_of(model, tiny_batch(), PRESETS["light"])[0]["hidden"]) == [0, 1, 2]


def training_set(rows=48):
    batch = tiny_batch(rows)
    lengths = batch["attention_mask"].sum(1)
    return Dataset.from_list([{"input_ids": ids[:length].tolist(), "attention_mask": [1] * int(length), "labels": int(label)}
                              for ids, length, label in zip(batch["input_ids"], lengths, batch["labels"])])


def trainer_for(folder, tokenizer, callbacks=(), preset="paper", student=None, teacher=None, **options):
    teacher = teacher or tiny_model("bert")
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 5,
        "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 4,
        "train_sampling_strategy": "group_by_length", **options})
    set_seed(arguments.seed)
    return DistillationTrainer(student or student_of(teacher), arguments, train_dataset=training_set(),
                               processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
                               teacher=teacher, distillation=DistillationConfig(PRESETS[preset]),
                               callbacks=list(callbacks))


def test_training_lowers_every_feature_term_and_leaves_the_teacher_alone(tmp_path, tokenizer):
    teacher = tiny_model("bert")
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_for(tmp_path, tokenizer, teacher=teacher, num_train_epochs=6, lr_scheduler_type="constant",
                          learning_rate=3e-3)
    fit(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss_hidden" in entry]
    for term in FEATURES:
        assert logged[-1][f"loss_{term}"] < logged[0][f"loss_{term}"], term
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class StopAt(TrainerCallback):
    """Stands for a kill: raises in the middle of training, between two checkpoints."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [[3], [8], [7, 13, 21]])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, tokenizer, steps):
    whole = trainer_for(tmp_path / "whole", tokenizer)
    fit(whole)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            fit(trainer_for(tmp_path / "cut", tokenizer, [StopAt(step)]))
    # What a kill in the middle of writing leaves behind is not taken for a checkpoint.
    (tmp_path / "cut" / "checkpoint-999").mkdir(exist_ok=True)
    resumed = trainer_for(tmp_path / "cut", tokenizer)
    fit(resumed)
    assert not (tmp_path / "cut" / "checkpoint-999").exists()
    assert whole.state.global_step == resumed.state.global_step == 24
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_gradient_accumulation_equals_the_larger_batch(tmp_path, tokenizer):
    """With every row of one length, two batches of 4 average to one of 8 term by term, so one step must agree."""
    rows = tiny_batch(8, 11)
    data = Dataset.from_list([{"input_ids": ids.tolist(), "attention_mask": [1] * 11, "labels": int(label)}
                              for ids, label in zip(rows["input_ids"], rows["labels"])])
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        teacher = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = trainer_for(tmp_path / str(size), tokenizer, preset="light", teacher=teacher, max_steps=1,
                              per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd",
                              learning_rate=0.1, train_sampling_strategy="sequential", lr_scheduler_type="constant",
                              max_grad_norm=0.0)
        trainer.train_dataset = data
        trainer.distillation = DistillationConfig({"task": 1.0, "logits": 1.0})
        trainer.train()
        results.append(trainer.model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_a_number_stops_with_step_and_term(tmp_path, tokenizer):
    teacher = tiny_model("bert")
    student = student_of(teacher)
    with torch.no_grad():
        student.classifier.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="step 0, term logits"):
        fit(trainer_for(tmp_path, tokenizer, teacher=teacher, student=student))


def test_a_student_of_another_shape_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="hidden_size"):
        trainer_for(tmp_path, tokenizer, student=tiny_model("bert", hidden_size=40), teacher=tiny_model("bert"))


def test_last_checkpoint_takes_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10" and not (tmp_path / "checkpoint-11").exists()
