"""What a user can get wrong about sizes, patterns and statistics: one line that says what is possible."""

import shutil

import pytest
import torch
from cases import arguments
from tiny_models import tiny_batch, tiny_model

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.methods import METHODS
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import NEEDS, collect_statistics


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"encoder_fraction": 0.001}, "the smallest is 0."),
        ({"encoder_fraction": 1.0}, "a share between 0 and 1"),
        ({"model_fraction": 0.01}, "dense parts and the least ranks weigh; the smallest is 0."),
        (
            {"flops_fraction": 0.001},
            "attention and the least ranks cost at length 128; the smallest is 0.",
        ),
        ({"rank": 10**6}, "the largest that compresses one is"),
        ({"include": "*nothing*"}, "names look like"),
        ({"exclude": "*nothing*"}, "names look like"),
        ({"method": "magic"}, "choose one of asvd"),
        ({"allocation": "fair"}, "choose one of uniform"),
        ({"embedding_rank": 10**6}, "give 1 to"),
        ({"embedding_rank": 0}, "give 1 to"),
        ({"max_drop": 0}, "above zero"),
        ({"latency_ms": -1}, "above zero"),
        ({"rank_multiple": 1000, "encoder_fraction": 0.5, "include": "*query"}, "the smallest is"),
        ({"plan_file": "none.json"}, "none.json"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_can(data, encoder_folder, capsys, changes, word):
    code = command(main, arguments(data, encoder_folder, **changes))
    error = capsys.readouterr().err
    assert code == 2 and word in error and error.count("\n") == 1 and error.startswith("error: "), (
        error
    )
    assert not (data / "run").exists()


@pytest.mark.slow
def test_what_only_a_run_finds_is_one_line_as_well(data, encoder_folder, capsys):
    """Statistics of other data or another model in the run's folder; a latency below and a quality above any plan's."""
    base = {"method": "whiten", "rank": 9, "num_train_epochs": 0.1, "teacher_num_train_epochs": 0.2}
    assert command(main, arguments(data, encoder_folder, "one", **base)) == 0
    assert (
        command(main, arguments(data, encoder_folder, "two", **base, calibration_samples=30)) == 0
    )
    for part in ("decomposed", "model"):
        shutil.rmtree(data / "two" / part)
    shutil.copy(data / "one" / "statistics.safetensors", data / "two" / "statistics.safetensors")
    small = {**base, "rank": None, "method": "svd"}
    capsys.readouterr()
    for out, changes, word in (
        ("two", {**base, "calibration_samples": 30}, "another model or other data"),
        ("fast", {**small, "latency_ms": 1e-4, "latency_seq_length": 9}, "the smallest takes"),
        ("slow", {**small, "latency_ms": 1e5, "latency_seq_length": 9}, "the dense model takes"),
    ):
        assert command(main, arguments(data, encoder_folder, out, **changes)) == 2
        error = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert len(error) == 1 and word in error[0], error


@pytest.mark.parametrize("method", sorted(METHODS))
def test_four_tokens_make_singular_covariances_and_yet_finite_factors(method):
    model, batch = tiny_model("bert"), tiny_batch(1, 4)
    statistics = collect_statistics(
        model, [batch], select_linears(model), needs=NEEDS, progress=False
    )
    for entry in statistics.inputs.values():
        assert torch.linalg.matrix_rank(entry.covariance, rtol=1e-5) < 5 <= len(entry.mean)
    decompose_(model, DecompositionConfig(method, rank=9), statistics=statistics, progress=False)
    assert model(**batch).logits.isfinite().all()
