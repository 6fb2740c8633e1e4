"""The benchmark of engines at toy size: every form in every engine, compared with torch, one row each."""

import pytest
from optional import needs
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import engines, units_time
from benchmarks.records import read_records
from bert_decomp.cli.command import command

pytestmark = [needs("export"), needs("openvino")]


def small_model(factor: int) -> BertForSequenceClassification:
    """Two layers of the size that the stored plans are for, and few tokens."""
    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=60,
        num_labels=6,
    )
    return BertForSequenceClassification(config).eval()


@pytest.mark.slow
def test_every_form_in_every_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "dense_model", small_model)
    monkeypatch.setattr(units_time, "EXPERIMENTS", ("mixed",))
    output = tmp_path / "engines.jsonl"
    line = ["--points", "1x7", "3xmix", "--sizes", "0.125", "--seconds", "0", "--least", "2"]
    assert command(engines.main, [*line, "--output", str(output)]) == 0
    (record,) = read_records(output)
    forms = ["dense", "mixed 0.125"]
    variants = [(form, engine) for form in forms for engine in engines.ENGINES]
    for point in ("1x7", "3xmix"):
        rows = [row for row in record["rows"] if row["point"] == point]
        assert [(row["form"], row["engine"]) for row in rows] == variants
        for row in rows:
            assert row["calls"] >= 2 and row["ms_q20"] <= row["ms"] <= row["ms_q80"]
            assert set(row["over_dense"]) == set(engines.ENGINES)
            if row["form"] == "dense":
                assert row["over_dense"][row["engine"]] == 1
    assert [(entry["form"], entry["engine"]) for entry in record["differences"]] == variants
    for entry in record["differences"]:
        assert entry["difference_from_torch"] < (0.5 if "int8" in entry["engine"] else 1e-4)
    assert set(record["float_blocks"]) == set(forms)
    assert record["environment"]["openvino"] and "cpu_features" in record["environment"]
    assert record["name"].startswith("minilm-") and record["name"].endswith("-1t")
