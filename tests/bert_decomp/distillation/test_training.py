"""What Trainer brings works with distillation: resuming, accumulation, mixed precision, evaluation, early stopping."""

import pytest
import torch
from cases import trainer_for, training_set
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from bert_decomp.distillation.losses import PRESETS, DistillationConfig, parse_terms
from bert_decomp.distillation.resumable import fit, last_checkpoint
from bert_decomp.distillation.teacher import with_teacher_logits
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import metrics_of
from bert_decomp.io.manifest import write_manifest

# transformers is giving it a new name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)


class StopAt(TrainerCallback):
    """Stands for a kill: raises in the middle of training, between two checkpoints."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULED = DistillationConfig(
    parse_terms("hidden=1..0@linear,attention_probabilities=0..1,logits=1@last,task=0.1..1")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps,terms", [([3], PRESETS["best"]), ([8], PRESETS["paper"]), ([7, 13, 21], SCHEDULED)]
)
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, tokenizer, steps, terms):
    whole = trainer_for(tmp_path / "whole", tokenizer, terms=terms)
    fit(whole)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            fit(trainer_for(tmp_path / "cut", tokenizer, [StopAt(step)], terms))
    # What a kill in the middle of writing leaves behind is not taken for a checkpoint.
    (tmp_path / "cut" / "checkpoint-999").mkdir(exist_ok=True)
    resumed = trainer_for(tmp_path / "cut", tokenizer, terms=terms)
    fit(resumed)
    assert not (tmp_path / "cut" / "checkpoint-999").exists()
    assert whole.state.global_step == resumed.state.global_step == 24
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_gradient_accumulation_equals_the_larger_batch(tmp_path, tokenizer):
    """With every row of one length, two batches of 4 average to one of 8 term by term, so one step must agree."""
    rows = tiny_batch(8, 11)
    data = Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "attention_mask": [1] * 11, "labels": int(label)}
            for ids, label in zip(rows["input_ids"], rows["labels"], strict=True)
        ]
    )
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        teacher = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = trainer_for(
            tmp_path / str(size),
            tokenizer,
            teacher=teacher,
            data=data,
            max_steps=1,
            terms=DistillationConfig({"task": 1.0, "logits": 1.0}),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        trainer.train()
        results.append(trainer.model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


class Poison(TrainerCallback):
    """Makes the student's head say NaN after a step, as a learning rate that is far too high does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 7:
            with torch.no_grad():
                model.classifier.weight.fill_(float("nan"))


def test_a_loss_that_is_not_a_number_stops_with_step_and_term_and_keeps_the_last_checkpoint(
    tmp_path, tokenizer
):
    with pytest.raises(UserError, match="step 7, term logits"):
        fit(trainer_for(tmp_path, tokenizer, [Poison()]))
    kept = last_checkpoint(tmp_path)
    assert kept.name == "checkpoint-5"
    assert all(
        torch.isfinite(value).all() for value in load_file(kept / "model.safetensors").values()
    )


def evaluating(**changes):
    return {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "num_train_epochs": 4,
        **changes,
    }


EVALUATION = {
    "eval_dataset": training_set(20),
    "compute_metrics": lambda found: metrics_of(found.predictions, found.label_ids),
}


@pytest.mark.slow
def test_the_best_model_is_kept_and_patience_ends_the_training(tmp_path, tokenizer):
    trainer = trainer_for(
        tmp_path, tokenizer, [EarlyStoppingCallback(2)], extra=EVALUATION, **evaluating()
    )
    fit(trainer)
    scores = {
        entry["step"]: entry["eval_accuracy"]
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    }
    best = max(scores, key=scores.get)
    assert (
        trainer.state.best_global_step == best
        and trainer.evaluate()["eval_accuracy"] == scores[best]
    )
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(
        torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items()
    )
    assert trainer.state.global_step == min(48, best + 10), (
        "two evaluations without a better one, or the end"
    )


@pytest.mark.slow
def test_early_stopping_resumed_equals_uninterrupted(tmp_path, tokenizer):
    """The count of evaluations without improvement survives the interruption."""
    ends = []
    for cuts in ((), (8, 13)):
        folder = tmp_path / str(len(cuts))
        options = evaluating(restore_callback_states_from_checkpoint=True, save_total_limit=1)
        for cut in cuts:
            with pytest.raises(KeyboardInterrupt):
                fit(
                    trainer_for(
                        folder,
                        tokenizer,
                        [EarlyStoppingCallback(2), StopAt(cut)],
                        extra=EVALUATION,
                        **options,
                    )
                )
        trainer = trainer_for(
            folder, tokenizer, [EarlyStoppingCallback(2)], extra=EVALUATION, **options
        )
        fit(trainer)
        ends.append((trainer.state.global_step, trainer.model.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_the_teacher_gets_every_input_it_knows(tmp_path, tokenizer):
    """Token types reach student and teacher through Trainer's removal of unused columns; foreign columns do not."""
    rows = tokenizer(
        ["the red cat", "a dog"], ["sees a hen", "is blue"], return_token_type_ids=True
    )
    data = Dataset.from_dict({**rows, "labels": [0, 1], "foreign": ["x", "y"]})
    assert any(1 in types for types in data["token_type_ids"])
    trainer, seen = trainer_for(tmp_path, tokenizer, data=data, max_steps=1), []
    trainer.teacher.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs), with_kwargs=True
    )
    fit(trainer)
    assert (
        set(seen[0]) == {"input_ids", "attention_mask", "token_type_ids"}
        and seen[0]["token_type_ids"].any()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,options",
    [
        ("bert", {"bf16": True}),
        ("mpnet", {"bf16": True}),
        ("modernbert", {"bf16": True}),
        ("bert", {CHECKPOINTING: True}),
        ("modernbert", {CHECKPOINTING: True}),
    ],
)
def test_lower_precision_and_checkpointing_stay_close_to_the_plain_loss(
    tmp_path, tokenizer, family, options
):
    """bfloat16 keeps 8 bits, so a sum of terms may move by a few per cent; checkpointing only computes again."""
    losses = []
    for changes in ({}, options):
        teacher = tiny_model(family)
        trainer = trainer_for(
            tmp_path / str(len(changes)),
            tokenizer,
            terms=PRESETS["best"],
            teacher=teacher,
            max_steps=3,
            logging_steps=1,
            **changes,
        )
        fit(trainer)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if "bf16" in options else 1e-4)


@pytest.mark.slow
def test_cached_logits_are_the_teachers_and_spare_it(tmp_path, tokenizer):
    teacher, data, terms = (
        tiny_model("bert"),
        training_set(),
        DistillationConfig({"logits": 1.0, "task": 0.5}),
    )
    cached = with_teacher_logits(teacher, data, tokenizer, tmp_path / "logits.safetensors", 7)
    for row, logits in list(zip(data, cached["teacher_logits"], strict=True))[:9]:
        expected = teacher(
            torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])
        ).logits[0]
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
    weights = []
    for examples in (data, cached):
        trainer, calls = (
            trainer_for(
                tmp_path / str(len(weights)),
                tokenizer,
                terms=terms,
                teacher=teacher,
                data=examples,
                optim="sgd",
                learning_rate=0.1,
            ),
            [],
        )
        trainer.teacher.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        fit(trainer)
        assert bool(calls) == (examples is data)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    again = with_teacher_logits(teacher, data, tokenizer, tmp_path / "logits.safetensors", 7)
    assert again["teacher_logits"][:] == cached["teacher_logits"][:]


def test_stale_cached_logits_are_refused(tmp_path, tokenizer):
    path = tmp_path / "logits.safetensors"
    with_teacher_logits(tiny_model("bert"), training_set(), tokenizer, path, 7)
    other = tiny_model("bert")
    with torch.no_grad():
        other.classifier.bias += 1
    for teacher, data in ((other, training_set()), (tiny_model("bert"), training_set(40))):
        with pytest.raises(UserError, match="another teacher or from other examples"):
            with_teacher_logits(teacher, data, tokenizer, path, 7)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        with_teacher_logits(other, training_set(), tokenizer, path, 7)


def test_last_checkpoint_takes_the_newest_whole_one(tmp_path):
    """Whole is what was sealed and is as it was then; a changed, cut or unsealed newer one goes."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11, 12, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(100))
        if step < 100:
            write_manifest(folder)
    (tmp_path / "checkpoint-11" / "weights").write_bytes(bytes(99) + b"x")
    (tmp_path / "checkpoint-12" / "weights").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
