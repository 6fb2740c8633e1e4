"""Result files: records by name, replaced in place, also by several processes at once."""

import multiprocessing

import pytest

from benchmarks.records import read_records, save_record


def _save(path, number):
    save_record(path, f"{number:02d}", {"value": number})


def test_records_are_sorted_and_replaced_by_name(tmp_path):
    path = tmp_path / "new" / "suite.jsonl"
    assert read_records(path) == []
    for name, value in (("b", 1.5), ("a", {"x": [1, None]}), ("b", "é")):
        save_record(path, name, {"value": value})
    expected = [{"name": "a", "value": {"x": [1, None]}}, {"name": "b", "value": "é"}]
    assert read_records(path) == expected
    with pytest.raises(ValueError):
        save_record(path, "c", {"value": float("nan")})
    assert read_records(path) == expected


def test_processes_that_save_at_once_lose_nothing(tmp_path):
    path = tmp_path / "suite.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save, args=(path, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [record["value"] for record in read_records(path)] == list(range(8))
