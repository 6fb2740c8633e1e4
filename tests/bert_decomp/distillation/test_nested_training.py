"""Training of several sizes at once: the mean of what each size alone would learn."""

import copy

import pytest
import torch
from cases import trainer_for
from nested_cases import FRACTIONS, every_units, nested
from tiny_models import tiny_batch, tiny_tokenizer

from bert_decomp.distillation.losses import PRESETS
from bert_decomp.distillation.resumable import fit
from bert_decomp.models.nested import (
    Nested,
    NestedLinear,
    take_size_,
)
from bert_decomp.models.nested_resized import NestedResized


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
    terms = PRESETS["best"]
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


@pytest.mark.slow
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
