"""The tables of the README and of docs are what the committed result files give."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bert_decomp.data.task import load_task

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_agrees_with_the_result_files():
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme_tables", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


@cache
def fingerprint(task):
    return load_task(task).fingerprint


RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_says_what_made_it(path):
    """Versions, commit and options; where a model was evaluated, of the text too, which is this repository's."""
    result = json.loads(path.read_text(encoding="utf-8"))
    about = result["environment"]
    assert about["python"] and about["torch"] and about["cpu"]
    assert about.get("commit") or result["commit"]
    assert any(key in result for key in ("options", "command", "experiment", "points"))
    text = path.read_text(encoding="utf-8")
    assert not any(place in text for place in ("/tmp/", "/home/", "/root/", "/work/")), (
        "paths of one machine"
    )
    if "metrics" in result or "task" in result:
        task = result["task"]
        name, data = (
            (task["name"], task["fingerprint"])
            if isinstance(task, dict)
            else (task, result["data"])
        )
        assert data == fingerprint(name)
