"""On a CPU a step takes a batch in slices: the same gradients and logs, and the memory of a slice."""

import pytest
import torch
from cases import trainer_for
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import TrainingArguments

from bert_decomp.data.batches import SLICE_TOKENS, slices
from bert_decomp.distillation import resumable
from bert_decomp.distillation.losses import PRESETS, DistillationConfig
from bert_decomp.distillation.terms import FEATURE_TERMS
from bert_decomp.evaluation.latency import HeldBytes

EVERYTHING = DistillationConfig({**dict.fromkeys(FEATURE_TERMS, 1.0), "logits": 2.0, "task": 0.5})
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def fine_tuner(folder):
    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    return resumable.ResumableTrainer(tiny_model("bert", **NO_DROPOUT), arguments)


def step(trainer, batch):
    """Loss and gradients of one step."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(batch))
    return loss, {
        name: parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


def test_slices_are_whole_sentences_in_order():
    batch = tiny_batch(13, 9)
    for tokens, most in ((1, 1), (9, 1), (26, 2), (40, 4), (117, 13), (10**6, 13)):
        parts = slices(batch, tokens)
        assert all(len(part["labels"]) <= most for part in parts)
        for name, value in batch.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", None])
def test_a_sliced_step_has_the_loss_and_gradients_of_the_whole(family, tmp_path, monkeypatch):
    """Without a family: plain fine-tuning."""
    found = {}
    for tokens in (10**6, 40, 11):
        monkeypatch.setattr(resumable, "SLICE_TOKENS", tokens)
        torch.manual_seed(0)
        if family is None:
            trainer = fine_tuner(tmp_path)
        else:
            trainer = trainer_for(
                tmp_path, tiny_tokenizer(), teacher=tiny_model(family), terms=EVERYTHING
            )
        found[tokens] = step(trainer, tiny_batch(7))
        if family is not None:
            assert trainer._term_steps == pytest.approx(1)
            found[tokens][1].update(trainer._term_sums)
    loss, gradients = found.pop(10**6)
    for other, others in found.values():
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
        assert others.keys() == gradients.keys()
        scale = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (others[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_the_memory_of_a_step_is_that_of_a_slice(tmp_path, monkeypatch):
    def peak(trainer, sentences):
        batch = tiny_batch(sentences, 32)
        with HeldBytes() as held:
            step(trainer, batch)
        return held.peak

    tuner = fine_tuner(tmp_path)
    distiller = trainer_for(tmp_path, tiny_tokenizer(), terms=PRESETS["paper"])
    rows = SLICE_TOKENS // 32
    sliced = [peak(tuner, rows), peak(tuner, 8 * rows), peak(distiller, 4 * rows)]
    monkeypatch.setattr(resumable, "SLICE_TOKENS", 10**6)
    whole = [peak(tuner, rows), peak(tuner, 8 * rows), peak(distiller, 4 * rows)]
    assert sliced[0] == whole[0] and sliced[1] <= 1.2 * sliced[0] < 0.3 * whole[1]
    # The teacher's features of the whole batch are held beside it.
    assert sliced[2] < 0.5 * whole[2]
