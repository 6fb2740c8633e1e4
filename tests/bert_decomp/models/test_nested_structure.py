"""Heads and neurons in several sizes: a smaller size is the largest one masked."""

import copy

import pytest
import torch
from nested_cases import FRACTIONS, logits, logits_at, nested
from tiny_models import tiny_batch, tiny_model

from bert_decomp import DecompositionConfig, UserError, decompose_
from bert_decomp.models.nested import (
    take_size_,
)
from bert_decomp.models.nested_resized import NestedResized
from bert_decomp.models.saving import LowRankConfig


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
