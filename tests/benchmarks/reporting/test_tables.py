"""Every generated table and figure of the pages is what the committed result files give."""

from functools import cache

import pytest

from benchmarks.quality.material import MATERIAL
from benchmarks.records import RESULTS, read_suite
from benchmarks.reporting import tables
from bert_decomp.data.task import load_task

pytestmark = pytest.mark.results
SUITES = sorted(path.stem for path in RESULTS.glob("*.jsonl"))


def test_pages_agree_with_the_result_files(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_table_is_filled_in_wherever_it_is_named(tmp_path):
    page = "text\n<!-- table: pivoted -->\n<!-- end -->\nmore\n"
    filled = tables.render(page, tmp_path)
    assert filled.startswith("text\n") and filled.endswith("<!-- end -->\nmore\n")
    assert "| 768 x 768 | dense |" in filled and tables.render(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        tables.render("<!-- table: nonsense -->\n<!-- end -->", tmp_path)


def test_links_to_figures_are_relative_to_the_page():
    page = "<!-- table: encoder -->\n<!-- end -->"
    for folder, link in (
        (tables.ROOT, "(docs/results/figures/bert-"),
        (tables.ROOT / "docs", "(results/figures/bert-"),
        (tables.ROOT / "docs" / "guides", "(../results/figures/bert-"),
    ):
        assert link in tables.render(page, folder)


@cache
def fingerprint_of(task_name):
    return load_task(task_name).fingerprint


@pytest.mark.parametrize("suite", SUITES)
def test_every_record_states_what_made_it(suite):
    """Versions, commit and options; where a model was evaluated, the text too, which is this repository's."""
    records = read_suite(suite)
    names = [record["name"] for record in records]
    assert names == sorted(set(names)) and names
    for record in records:
        environment, name = record["environment"], record["name"]
        assert environment["python"] and environment["torch"] and environment["cpu"], name
        assert environment.get("commit") or record["commit"], name
        assert any(key in record for key in ("options", "command", "experiment", "points")), name
        if "metrics" in record or "task" in record:
            task = record["task"]
            task_name, data = (
                (task["name"], task["fingerprint"])
                if isinstance(task, dict)
                else (task, record["data"])
            )
            if task_name in MATERIAL:
                # That text is made by packages that the tests do without: its records agree among themselves.
                assert all(other["data"] == data for other in records if other["task"] == task_name)
            else:
                assert data == fingerprint_of(task_name), name


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_no_result_holds_a_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    places = ("/tmp/", "/home/", "/root/", "/work/", "/opt/")
    assert not any(place in text for place in places), "paths of one machine"
