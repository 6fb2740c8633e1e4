"""Tiny models of several sizes, for the tests of what they are, how they load, plan and train."""

import pytest
import torch
from tiny_models import made_once, tiny_batch, tiny_model

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.models.nested import (
    use_size_,
)

FRACTIONS = (0.7, 0.4, 0.25)


every_family = pytest.mark.parametrize("family", ("bert", "distilbert", "mpnet", "modernbert"))


@made_once
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
