"""The benchmark's own parts: it runs from end to end at its smallest, and its figures follow from what it timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import operators
from benchmarks.records import read_records
from benchmarks.reporting import operators as report


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the GPU suite is minutes long; this is the CPU's short version",
)
@pytest.mark.slow
def test_short_run_and_report(tmp_path, monkeypatch):
    """Every operator is timed in every column, and the report shows the medians and ratios that the file holds."""
    monkeypatch.delenv(
        "TRITON_INTERPRET", raising=False
    )  # Nobody wants to know how fast the interpreter is.
    monkeypatch.setattr(
        operators,
        "points",
        lambda gpu, chosen: [
            operators.Point(name, 3, 32, 32, 48 if name == "ffn" else 0, 8, "float32", backward)
            for name in chosen
            for backward in (False, True)
        ],
    )
    assert operators.main(["--budget", "0.001", "--output", str(tmp_path / "o.jsonl")]) == 0
    (content,) = read_records(tmp_path / "o.jsonl")
    text = report.table(content)
    report.plot(content, tmp_path / "o.png")
    assert len(content["points"]) == 8 and content["left_out"] == 0
    for point in content["points"]:
        columns = point["columns"]
        assert {"dense", "two_matmuls"} <= columns.keys()
        assert all("error" not in value for value in columns.values()), columns
        assert f"| two_matmuls | {columns['two_matmuls']['ms']:.4f} " in text
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_counts_of_work():
    """By hand for 2 rows, 3 -> 5 over rank 7, and for a feed-forward 3 -> 11 -> 3."""
    linear = operators.Point("linear", 2, 3, 5, 0, 7, "float32")
    assert linear.flops() == 2 * 2 * 7 * (3 + 5) and linear.bytes() == 4 * (
        2 * 3 + 2 * 5 + 7 * 3 + 5 * 7
    )
    ffn = operators.Point("ffn", 2, 3, 3, 11, 7, "bfloat16")
    assert ffn.flops() == 2 * 2 * 7 * (3 + 11 + 11 + 3) and ffn.bytes() == 2 * (
        2 * 6 + 2 * 7 * (3 + 11)
    )
    assert operators.Point("qkv", 2, 3, 3, 0, 7, "bfloat16", True).flops() == 3 * 3 * 2 * 2 * 7 * 6
