"""What tests of the inference form share: low-rank models, batches of every kind of mask, how close is close."""

import torch
from tiny_models import made_once, tiny_batch, tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.runtime.encoder import FusedEncoder


@made_once
def low_rank(family="bert", rank=7, **options):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=rank, **options), progress=False)
    return model


@made_once
def partly_low_rank(family="bert"):
    """Factored, but for a dense layer in the middle."""
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=9, exclude=["*.1.*"]), progress=False)
    return model


def assert_close(fused, unfused, exact):
    """At most twice as far from float64 as the unfused form, plus a few roundings of the result."""
    bound = (
        2 * (unfused - exact).abs().max() + 4 * torch.finfo(unfused.dtype).eps * exact.abs().max()
    )
    assert (fused - exact).abs().max() <= bound


def relative(result, exact):
    return ((result - exact).norm() / exact.norm()).item()


def encoder_of(model):
    """The fused encoder of a model."""
    (encoder,) = (module for module in model.modules() if isinstance(module, FusedEncoder))
    return encoder


def inputs(kind, family):
    batch = {name: value for name, value in tiny_batch(7, 13).items() if name != "labels"}
    mask = batch["attention_mask"]
    if kind == "no mask":
        return {"input_ids": batch["input_ids"]}
    if kind == "no padding":
        mask.fill_(1)
    elif kind == "left":
        batch["attention_mask"] = mask.flip(1)
    elif kind == "gaps":
        mask[1, :9] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1])
    elif kind == "one sentence":
        return {name: value[1:2] for name, value in batch.items()}
    elif kind == "single tokens":
        return {name: value[:, :1] for name, value in batch.items()}
    return batch
