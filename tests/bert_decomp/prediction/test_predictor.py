"""What a predictor asks of the runtime."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from bert_decomp.prediction import predictor as module
from bert_decomp.prediction.predictor import Predictor


@pytest.mark.parametrize(
    ("family", "device", "graphs"),
    [("bert", "cuda", "auto"), ("modernbert", "cuda", ()), ("bert", "cpu", ())],
)
def test_small_batches_are_graphs_on_a_gpu_where_the_encoder_can_be(
    family, device, graphs, monkeypatch
):
    given = []
    monkeypatch.setattr(module, "fuse_", lambda model, **options: given.append(options) or model)
    predictor = object.__new__(Predictor)
    predictor.device = torch.device(device)
    predictor._fused(tiny_model(family), None)
    assert given == [{"graphs": graphs}]
