"""A tiny model of which the word embedding is more than half, and how it is decomposed."""

import copy

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from bert_decomp import DecompositionConfig, decompose_

BATCHES = [tiny_batch(20, 13)]
BATCH = {name: value for name, value in tiny_batch().items() if name != "labels"}
UNITS = ("matrices", "structured", "mixed")
every_units = pytest.mark.parametrize("units", UNITS)


def wide(family="bert", **changes):
    """A model of which the word embedding is more than half."""
    changes = {"vocab_size": 613, **changes}
    return tiny_model(family, **changes)


def decomposed(model, **options):
    student = copy.deepcopy(model)
    options = {"min_rank": 1, **options} if options.get("units") == "matrices" else options
    plan = decompose_(student, DecompositionConfig(**options), BATCHES, progress=False)
    return student, plan


def entry(plan):
    return next(iter(plan.embeddings.values()))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits
