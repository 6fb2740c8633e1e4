"""Attention of the runtime in one Triton kernel, by the interpreter: every layout, heads of unequal sizes, 16 bits."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from cases import resized
from tiny_models import tiny_batch, tiny_model

from bert_decomp.runtime import fuse_
from bert_decomp.runtime.encoder import FusedEncoder
from lowrank_kernels import dispatch, use_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton needs a GPU or its interpreter",
    ),
]
LAYOUTS = ("packed", "padded", "padded, prefix known", "no mask")


def batch_of(layout: str) -> dict[str, torch.Tensor]:
    batch = {name: value for name, value in tiny_batch(4, 9).items() if name != "labels"}
    return {"input_ids": batch["input_ids"]} if layout == "no mask" else batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_model, resized], ids=["dense", "resized"])
@torch.no_grad()
def test_logits_are_no_further_from_float64_than_the_unfused_models(make, layout, monkeypatch):
    model, batch = make("bert").bfloat16(), batch_of(layout)
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    fuse_(model, unpad=layout == "packed")
    encoder = next(module for module in model.modules() if isinstance(module, FusedEncoder))
    encoder.prefix = layout == "padded, prefix known"
    served, choose = [], dispatch.choose

    def noting(backend, problem, *rest):
        found = choose(backend, problem, *rest)
        served.append((problem.operator, found[0]))
        return found

    monkeypatch.setattr(dispatch, "choose", noting)
    with use_backend("triton"):
        fused = model(**batch).logits
    bound = 2 * (unfused - exact).abs().max() + 4 * torch.finfo(torch.bfloat16).eps
    assert (fused - exact).abs().max() <= bound
    # With a mask that may have gaps, library calls do it.
    wanted = {("attention", "triton")} if layout != "padded" else set()
    assert {one for one in served if one[0] == "attention"} == wanted
