"""Metrics against scikit-learn's and scipy's own, and the measuring of forms."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy, spearmanr
from sklearn.metrics import f1_score
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.evaluation.latency import backend_of, measure, peak_memory, random_inputs
from bert_decomp.evaluation.metrics import divergence, evaluate, main_metric, metrics_of
from lowrank_kernels import LowRankLinear


def test_metrics_by_kind_of_label():
    logits = np.array([[2.0, 1], [0, 1], [3, 1], [0, 5]])
    found = metrics_of(logits, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75 and found["f1"] == f1_score([0, 1, 1, 1], [0, 1, 0, 1])
    assert main_metric(found) == "accuracy"
    three = metrics_of(np.eye(3), np.array([0, 1, 1]))
    assert three["f1"] == f1_score([0, 1, 1], [0, 1, 2], average="macro", zero_division=0)
    values, scores = np.array([[0.1], [0.5], [0.3]]), np.array([1.0, 3.0, 2.5])
    assert metrics_of(values, scores)["spearmanr"] == pytest.approx(
        spearmanr(values[:, 0], scores).statistic
    )
    assert metrics_of(np.zeros((3, 1)), scores) == {"pearson": 0.0, "spearmanr": 0.0}


def test_divergence_is_scipys_relative_entropy_and_blind_to_a_shift():
    teacher, student = torch.randn(2, 7, 5)
    expected = np.mean(
        [
            entropy(p, q)
            for p, q in zip(teacher.softmax(-1).double(), student.softmax(-1).double(), strict=True)
        ]
    )
    assert divergence(teacher, student) == pytest.approx(expected, rel=1e-5)
    assert divergence(teacher, teacher + 3) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_padding_and_batching_change_no_metric(family):
    model, batch = tiny_model(family), tiny_batch(9)
    single = [
        {
            name: value[i : i + 1, : int(batch["attention_mask"][i].sum())]
            if value.ndim == 2
            else value[i : i + 1]
            for name, value in batch.items()
        }
        for i in range(9)
    ]
    assert evaluate(model, [batch], progress=False) == evaluate(model, single, progress=False)


def low_rank(family="bert", rank=7):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=rank), progress=False)
    return model


def test_measure_has_a_row_for_every_form_and_batch_and_puts_threads_back():
    model, dense = low_rank(), tiny_model("bert")
    torch.set_num_threads(2)
    found = measure(
        {"dense": (dense, None), "low-rank": (model, "torch")},
        [1, 3],
        9,
        seconds=0.01,
        threads=1,
        progress=False,
    )
    assert torch.get_num_threads() == 2 and found["threads"] == 1
    assert [(row["form"], row["batch_size"]) for row in found["rows"]] == [
        ("dense", 1),
        ("low-rank", 1),
        ("dense", 3),
        ("low-rank", 3),
    ]
    for row in found["rows"]:
        assert row["latency_ms_q20"] <= row["latency_ms"] <= row["latency_ms_q80"]
        assert row["sentences_per_second"] == pytest.approx(
            1e3 * row["batch_size"] / row["latency_ms"]
        )
        assert row["peak_activation_mb"] > 0
    assert all(row["speedup"] == 1 for row in found["rows"] if row["form"] == "dense")


def test_peak_memory_counts_what_a_pass_holds_at_once():
    class Holds(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            kept = torch.ones(1000, 1000)
            return (kept + torch.ones(1000, 1000)).sum()

    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        assert 12e6 <= peak_memory(Holds(), {"input_ids": ids, "attention_mask": ids}) < 12.1e6


def test_backends_are_put_back_even_after_an_error():
    model = low_rank()
    layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    with pytest.raises(RuntimeError), backend_of(model, "torch"):
        assert layer.backend == "torch"
        raise RuntimeError
    assert layer.backend is None


def test_random_inputs_are_the_same_every_time():
    model = tiny_model("bert")
    assert torch.equal(
        random_inputs(model, 2, 5)["input_ids"], random_inputs(model, 2, 5)["input_ids"]
    )
