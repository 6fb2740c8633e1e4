"""The end-to-end benchmark: its plan, its batches, and one row for each form and mode that ran."""

import pytest
import torch

from benchmarks import bert, encoders
from benchmarks.records import read_records
from benchmarks.reporting import plots
from bert_decomp.cli.command import command


@pytest.mark.parametrize("shape, layers", [("bert-base", 12), ("minilm", 6)])
def test_the_plan_is_mixed_multiples_of_8_for_every_matrix(shape, layers):
    ranks = encoders.planned(shape, layers)
    assert all(len(by_layer) == layers for by_layer in ranks.values()) and len(ranks) == 6
    values = [rank for by_layer in ranks.values() for rank in by_layer if rank is not None]
    assert all(rank % 8 == 0 and rank > 0 for rank in values) and len(set(values)) > 5


@pytest.mark.parametrize(
    "point, shape",
    [("3x7", (3, 7)), ("1x32", (1, 32)), ("8xmix", (8, None)), ("512xmix", (512, 53))],
)
def test_batches_have_the_size_asked_for_and_count_real_tokens(point, shape):
    inputs, tokens = encoders.inputs_of(point, 100, "cpu")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape[0] == shape[0] and ids.shape[1] == (shape[1] or ids.shape[1])
    assert tokens == mask.sum() and not ids[mask == 0].any()
    assert torch.equal(mask, mask.sort(1, descending=True).values), "padding stands at the right"
    assert (tokens < mask.numel()) == ("mix" in point)


@pytest.mark.slow
def test_one_row_for_every_form_and_a_plot(tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 90}
    monkeypatch.setitem(encoders.SHAPES, "minilm", {**encoders.SHAPES["minilm"], **small})
    line = [
        "--device",
        "cpu",
        "--shapes",
        "minilm",
        "--points",
        "2x5",
        "3xmix",
        "--compiled",
        "--seconds",
        "0",
        "--least",
        "2",
        "--output",
        str(tmp_path / "bert-small.jsonl"),
    ]
    assert command(bert.main, line) == 0
    (result,) = read_records(tmp_path / "bert-small.jsonl")
    assert not result["failed"] and not result["left_out"]
    assert [(row["size"], row["form"]) for row in result["rows"] if row["point"] == "2x5"] == [
        ("dense", "dense"),
        ("dense", "fused runtime"),
    ] + [(size, form) for size in ("48 %", "25 %, mixed ranks") for form in encoders.FORMS]
    for row in result["rows"]:
        assert (
            row["latency_ms_q20"] <= row["latency_ms"] <= row["latency_ms_p95"]
            and row["calls"] >= 2
        )
        assert row["tokens_per_second"] == pytest.approx(
            1e3 * row["real_tokens"] / row["latency_ms"]
        )
        assert sum(row["time_split"].values()) == pytest.approx(1) and row["peak_activation_mb"] > 0
    assert "fused runtime" in plots.encoder(result)
    # A limit of no time leaves every point out, and says which.
    assert command(bert.main, [*line, "--minutes", "0"]) == 0
    (result,) = read_records(tmp_path / "bert-small.jsonl")
    assert result["left_out"] == [
        "minilm fp32 2x5",
        "minilm fp32 3xmix",
    ]
