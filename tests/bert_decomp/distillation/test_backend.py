"""Which operators train a student: those that are right and faster, by a timer that is told what to say."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.distillation import backend
from lowrank_kernels import LowRankLinear, dispatch, tuning, use_backend
from lowrank_kernels.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def student():
    model = tiny_model("bert")
    decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    return model.to(DEVICE)


@pytest.fixture
def batch():
    return {n: v.to(DEVICE) for n, v in tiny_batch(3, 6).items() if n != "labels"}


def _times(monkeypatch, seconds):
    """Have ``take_turns`` say these times, after one call of each in its context."""

    def told(calls, budget, *, cuda, within):
        for name, call in calls.items():
            with within(name):
                call()
        return {name: [seconds[name]] * 3 for name in calls}

    monkeypatch.setattr(backend, "take_turns", told)


@pytest.mark.parametrize("fused, best", [(0.5, "dense"), (2.0, "torch")])
def test_the_faster_backend_is_chosen(student, batch, monkeypatch, fused, best):
    _times(monkeypatch, {"dense": fused, "torch": 1.0})
    assert backend.faster_backend(student, batch, names=("dense", "torch")) == best
    assert all(parameter.grad is None for parameter in student.parameters())


def test_without_factors_of_one_rank_nothing_is_compared(batch, monkeypatch):
    _times(monkeypatch, {"dense": 0.1, "torch": 1.0})
    for model in (tiny_model("bert"), nested()):
        assert backend.faster_backend(model, batch, names=("dense", "torch")) == "torch"


def nested():
    model = tiny_model("bert")
    decompose_(model, DecompositionConfig("svd", nested_fractions=[0.6, 0.3]), progress=False)
    return model


def test_wrong_gradients_are_refused(student, batch, monkeypatch, caplog):
    _times(monkeypatch, {"dense": 0.1, "torch": 1.0})
    gradients = backend._gradients

    def wrong(*arguments):
        return [2 * g if dispatch.override() == "dense" else g for g in gradients(*arguments)]

    monkeypatch.setattr(backend, "_gradients", wrong)
    assert backend.faster_backend(student, batch, names=("dense", "torch")) == "torch"
    assert "gradients by backend dense are off" in caplog.text


def test_both_directions_of_every_layer_are_calibrated(student, batch, monkeypatch):
    handed = []
    monkeypatch.setattr(backend, "calibrate", lambda problems, device: handed.extend(problems))
    _times(monkeypatch, {"auto": 1.0, "torch": 2.0})
    assert backend.faster_backend(student, batch, torch.bfloat16) == "auto"
    layers = [module for module in student.modules() if isinstance(module, LowRankLinear)]
    assert len(handed) == 2 * len(layers) and {p.dtype for p in handed} == {torch.bfloat16}
    widths = {(problem.inner, problem.outer) for problem in handed}
    assert widths == {(outer, inner) for inner, outer in widths} and len(widths) > 1


def test_under_autocast_the_table_of_its_dtype_decides(monkeypatch):
    """x in float32 becomes bfloat16 in the call, so that is what must have been measured."""
    problem = Problem("linear", 4, 32, 48, 16, torch.bfloat16)
    choice = tuning.Choice("triton", {}, {"triton": 0.01})
    table = tuning.Table({tuning.key(problem): tuning.Entry(choice, choice)})
    asked = []
    monkeypatch.setattr(dispatch, "route", lambda x, name: "auto")
    monkeypatch.setattr(
        dispatch,
        "choose",
        lambda name, problem, *rest: asked.append(table.find(problem)) or ("torch", {}),
    )
    x = torch.randn(4, 32)
    dispatch.settle(None, x, "linear", 48, 16)
    with torch.autocast("cpu", torch.bfloat16):
        dispatch.settle(None, x, "linear", 48, 16)
        dispatch.settle(None, x.double(), "linear", 48, 16)
    assert [found is not None for found in asked] == [False, True, False]


def test_the_job_asks_on_a_gpu_and_with_real_examples(student, monkeypatch):
    tokenizer, asked = tiny_tokenizer(), []
    texts = tokenizer(["one", "two words", "three words here"])
    train = Dataset.from_dict({**texts, "labels": [0, 1, 0]})
    arguments = SimpleNamespace(
        device=torch.device("cpu"), bf16=True, fp16=False, per_device_train_batch_size=2
    )
    assert backend.training_backend(student, arguments, train, tokenizer) == "torch"
    with use_backend("dense"):
        assert backend.training_backend(student, arguments, train, tokenizer) == "dense"

    def chosen(model, batch, dtype):
        asked.append((batch, dtype))
        return "auto"

    monkeypatch.setattr(backend, "faster_backend", chosen)
    pretended = SimpleNamespace(**{**vars(arguments), "device": SimpleNamespace(type="cuda")})
    twin = copy.deepcopy(student)
    monkeypatch.setattr(twin, "to", lambda device: twin)
    monkeypatch.setattr("transformers.BatchEncoding.to", lambda batch, device: batch)
    assert backend.training_backend(twin, pretended, train, tokenizer) == "auto"
    ((batch, dtype),) = asked
    assert dtype == torch.bfloat16 and len(batch["input_ids"]) == 2 and "labels" not in batch
