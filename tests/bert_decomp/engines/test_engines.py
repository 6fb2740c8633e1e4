"""Engines compute what torch does, and a latency is met in the one that is asked for."""

from types import SimpleNamespace

import pytest
import torch
from optional import needs
from tiny_models import tiny_batch, tiny_model
from torch import nn

import bert_decomp.evaluation.latency
import lowrank_kernels.measure
from bert_decomp import DecompositionConfig, UserError, decompose_
from bert_decomp.engines import ENGINES, Engine
from bert_decomp.planning.costs import _Attention

BATCHES = [tiny_batch(20, 13)]


def relative(result, expected):
    return float((result - expected).norm() / expected.norm())


def optional(name):
    extra = next(
        (own for part, own in (("onnx", "export"), ("openvino", "openvino")) if part in name), None
    )
    return pytest.param(name, marks=[needs(extra)] if extra else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", map(optional, ENGINES))
@torch.no_grad()
def test_an_engine_computes_what_torch_does(name):
    engine, random = ENGINES[name], torch.Generator().manual_seed(0)
    parts = [(nn.Linear(19, 35), ((21, 19),))]
    # ONNX's converter takes seconds a module, and the tests of export know it.
    if "onnx" not in name:
        parts.append((_Attention(), ((3, 7, 2, 5), (3, 7, 2, 5), (3, 7, 2, 9))))
    # In int8 one sample calibrates: coarse, but its time is that of any other.
    bound = 0.5 if "int8" in name else 1e-5
    for module, shapes in parts:
        inputs = tuple(torch.randn(shape, generator=random) for shape in shapes)
        assert relative(engine.part(module, inputs)(), module(*inputs)) < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", map(optional, ("fused", "fused-int8", "openvino")))
@torch.no_grad()
def test_an_engine_runs_a_model(name):
    model = tiny_model("bert").eval()
    batch = {key: value[:1] for key, value in BATCHES[0].items() if key != "labels"}
    answer = ENGINES[name].model(model, batch)()
    logits = answer if isinstance(answer, torch.Tensor) else answer.logits
    assert relative(logits, model(**batch).logits) < (0.3 if "int8" in name else 1e-4)


def test_a_latency_is_that_of_the_engine(monkeypatch):
    # On a clock of its own, this engine takes a microsecond for every hundred weights of the encoder.
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    for module in (bert_decomp.evaluation.latency, lowrank_kernels.measure):
        monkeypatch.setattr(module, "time", clock)

    def weights(module):
        return sum(x.numel() for x in module.parameters() if x.ndim > 1)

    def wait(count):
        return lambda: setattr(clock, "now", clock.now + 1e-8 * count)

    slow = Engine(
        lambda module, _: wait(weights(module)),
        lambda model, _: wait(weights(model.bert.encoder)),
    )
    monkeypatch.setitem(ENGINES, "slow", slow)
    model = tiny_model("bert", hidden_size=64, intermediate_size=256, num_attention_heads=4)
    dense = weights(model.bert.encoder)
    config = DecompositionConfig(
        units="structured",
        latency_ms=1e-5 * dense / 2,
        latency_engine="slow",
        latency_seq_length=8,
    )
    plan = decompose_(model, config, BATCHES, progress=False)
    assert weights(model.bert.encoder) == pytest.approx(dense / 2, rel=0.06)
    assert plan.encoder_fraction == pytest.approx(0.5, abs=0.03)


def test_an_unknown_engine_is_refused_before_anything_is_computed():
    config = DecompositionConfig(latency_ms=1.0, latency_engine="tensorrt")
    with pytest.raises(UserError, match="openvino-int8"):
        decompose_(tiny_model("bert"), config, BATCHES, progress=False)
