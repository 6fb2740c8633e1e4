"""Whole numbers as classes, balance and shared texts, and what is shown of the data before anything long starts."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from cases import write
from data.reading_cases import MODEL, put, read, refused
from datasets import ClassLabel, Dataset, Features, Value

from bert_decomp.data.describe import describe
from bert_decomp.data.files import load_files
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.tables import read_table
from bert_decomp.data.task import load_task
from bert_decomp.evaluation.metrics import metrics_of

# 6. Class indices.


@pytest.mark.parametrize("labels", [["1", "0"], [1, 0], [1.0, 0.0], ["LABEL_1", "LABEL_0"]])
def test_whole_numbers_are_class_indices_and_the_mapping_is_shown(tmp_path, labels, tokenizer):
    rows = [("a fine film", labels[0]), ("bad", labels[1])]
    path = write(tmp_path / "t.jsonl", rows, ("text", "label"))
    data, reading = read(path)
    assert data["label"] == [1, 0] and set(reading.written.values()) == {"negative", "positive"}
    schema = describe(load_files(path, path, model=MODEL), tokenizer, 20)
    word = str(labels[0]).removesuffix(".0")
    assert f"1 positive (written {word}): 1" in "\n".join(schema.lines())


def test_labels_are_matched_by_name_then_by_number_then_in_other_letters(tmp_path):
    path = put(tmp_path / "t.csv", "text,label\na b,POSITIVE\nc d,Negative\n")
    assert read(path)[0]["label"] == [1, 0]
    numbers = put(tmp_path / "n.csv", "text,label\na b,1\nc d,2\n")
    assert read(numbers, ModelLabels.named("1", "2"))[0]["label"] == [0, 1]
    refused(r"the model lacks: 2; the known ones are 0 \(negative\), 1 \(pos", read, numbers)
    assert read(numbers, ModelLabels(3, None))[0]["label"] == [1, 2]
    words = put(tmp_path / "w.csv", "text,label\na b,good\nc d,bad\n")
    refused(
        "the model lacks: bad, good; the known ones are 0, 1: .*classes have no names",
        load_files,
        words,
        words,
        model=ModelLabels(2, None),
    )


def test_class_names_written_by_datasets_are_kept(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = {"text": ["a b", "c d", "e f"], "label": [1, 0, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    path = str(tmp_path / "t.parquet")
    task = load_files(path, path)
    assert task.label_names == ("zebra", "ant") and task.train["label"][:] == [1, 0, 0]
    assert read(path, ModelLabels.named("ant", "zebra"))[0]["label"] == [0, 1, 1]
    refused("labels that the model lacks: ant, zebra", read, path)
    Dataset.from_dict({"text": ["a b"], "label": [-1]}, features=features).to_parquet(path)
    refused("label -1 is none of the classes 0 to 1", read, path)


# 7. Balance, and what two files share.


def test_differences_between_training_and_validation_are_shown(tmp_path, tokenizer):
    model = ModelLabels.named("x", "y", "z")
    train = put(tmp_path / "t.csv", "text,label\na b,x\nc d,y\ne f,x\n")
    validation = put(tmp_path / "v.csv", "text,label\na b,x\ng h,z\ne f,z\n")
    task = load_files(train, validation, model=model)
    schema = describe(task, tokenizer, 20)
    assert [split.classes for split in schema.splits] == [
        {"x": 2, "y": 1, "z": 0},
        {"x": 1, "y": 0, "z": 2},
    ]
    assert schema.notes == (
        "validation has no example of: 'y'",
        "train has no example of: 'z'",
        "2 of 3 texts of validation are in train too",
    )
    refused("lacks: z", load_files, train, validation)


def test_a_validation_of_one_class_gives_accuracy_alone(tmp_path, tokenizer):
    train = put(tmp_path / "t.csv", "text,label\na b,x\nc d,y\n")
    validation = put(tmp_path / "v.csv", "text,label\ne f,y\ng h,y\n")
    schema = describe(load_files(train, validation), tokenizer, 20)
    assert "every example is of the class 'y'" in "\n".join(schema.lines())
    always_right = np.array([[0.0, 1.0]] * 4)
    assert metrics_of(always_right, np.ones(4, int)) == {"accuracy": 1.0}
    assert metrics_of(always_right, np.ones(4, int), "f1") == {"accuracy": 1.0}
    assert set(metrics_of(always_right, np.array([0, 1, 1, 1]))) > {"f1"}


# The schema.


def test_the_schema_says_what_was_read_cut_and_left_out(tmp_path, tokenizer):
    rows = [("the red cat sees a dog " * 3, "x"), ("the owl", "y")] * 10
    path = write(tmp_path / "t.csv", rows, ("text", "label"))
    schema = describe(load_files(path, None).limited(12, None), tokenizer, 9)
    train, validation = schema.splits
    assert train.reading.left_out == {"held out for validation": 2, "beyond max_train_samples": 6}
    assert validation.reading.left_out == {"used for training": 18}
    for split in schema.splits:
        assert split.reading.rows == 20 == split.examples + sum(split.reading.left_out.values())
    assert (train.longest, train.max_length) == (20, 9) and 0 < train.cut < 12
    text = "\n".join(schema.lines())
    assert re.search(r"train: cut to 9 tokens: \d+ of 12 \(the longest has 20\)", text)
    assert re.search(r"first example: \[CLS\] the .*\[SEP\] -> [xy]", text)
    assert json.loads(json.dumps(schema.to_dict()))["splits"][0]["classes"] == train.classes


@pytest.mark.parametrize("name,rows", [("questions", 15452), ("movies", 10605)])
def test_embedded_tasks_name_the_rows_they_leave_out(name, rows):
    task = load_task(name)
    for split, data in (("train", task.train), ("validation", task.validation)):
        reading = task.readings[split]
        assert reading.rows == rows == len(data) + sum(reading.left_out.values())
        assert reading.left_out["repeated"]


def test_what_a_terminal_would_obey_is_escaped(tmp_path, tokenizer):
    path = put(tmp_path / "t.csv", "text,label\nthe \x1b[2J cat,a\x1b[31m\na dog,b\n")
    lines = describe(load_files(path, path), tokenizer, 20).lines()
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "values"])
def test_json_that_is_no_table_of_rows_is_refused(tmp_path, orient):
    path = tmp_path / "t.json"
    pd.DataFrame({"text": ["a b", "c d"], "label": ["x", "y"]}).to_json(path, orient=orient)
    refused("one flat object a line", read_table, str(path))
