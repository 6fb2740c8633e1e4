"""What tests of plans share: made-up spectra of four matrices, and a copy of a model decomposed by a plan."""

import copy

import torch

from bert_decomp.decomposition.decompose import decompose_

SHAPES = {"a": (12, 12), "b": (12, 12), "c": (30, 12), "d": (12, 30)}


def falling(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(min(shape), dtype=torch.float64, generator=generator).cumsum(0).flip(0)
        for name, shape in SHAPES.items()
    }


ONES = dict.fromkeys(SHAPES, 1.0)


def decomposed(model, config, statistics, plan):
    student = copy.deepcopy(model)
    decompose_(student, config, statistics=statistics, plan=plan, progress=False)
    return student
