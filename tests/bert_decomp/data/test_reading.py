"""Files that people really have: the right value is read, or the refusal says how to write it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cases import write
from datasets import ClassLabel, Dataset, Features, Value

from bert_decomp.data.describe import describe
from bert_decomp.data.files import load_files, load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.tables import read_table
from bert_decomp.data.task import load_task
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import metrics_of

MODEL = ModelLabels.named("negative", "positive")
SCORE = ModelLabels(1, None)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, model=MODEL, **options):
    data, reading = load_labelled(path, model, **options)
    assert reading.rows == len(data) + sum(reading.left_out.values())
    return data.to_dict(), reading


def refused(word, call, *arguments, **options):
    with pytest.raises(UserError, match=word) as refusal:
        call(*arguments, **options)
    message = str(refusal.value)
    assert "\n" not in message and "--" not in message
    return message


# 1. Quotes.


def test_tsv_has_no_quoting(tmp_path):
    rows = [f"{chr(34) if index in (4, 11) else ''}text {index} of it" for index in range(20)]
    path = put(
        tmp_path / "quotes.tsv",
        "text\tlabel\n" + "".join(f"{row}\tpositive\n" for row in rows),
    )
    data, reading = read(path)
    assert data["text"] == rows and reading.rows == 20
    odd = put(tmp_path / "odd.tsv", 'text\tlabel\n"one quote of\tpositive\nnone of\tnegative\n')
    assert read(odd)[0]["text"] == ['"one quote of', "none of"]


def test_csv_has_quoting_and_a_wrong_quote_is_named(tmp_path):
    path = put(
        tmp_path / "good.csv",
        'text,label\n"a ""fine"", long\nfilm",positive\nsay "hi" now,negative\n',
    )
    data, reading = read(path)
    assert data == {"text": ['a "fine", long\nfilm', 'say "hi" now'], "label": [1, 0]}
    assert "fields over several lines: line 2" in reading.notes
    bad = put(tmp_path / "bad.csv", 'text,label\na film,positive\n"a" film,negative\n')
    refused("row that begins at line 3", read, bad)
    open_ = put(
        tmp_path / "open.csv", 'text,label\na film,positive\n"a film,negative\nb,positive\n'
    )
    refused("row that begins at line 3", read, open_)


def test_a_tsv_with_quotes_of_a_spreadsheet_is_asked_about_or_read(tmp_path):
    path = put(tmp_path / "q.tsv", 'text\tlabel\n"a ""fine"" film"\tpositive\n')
    refused(r"line 2 may belong to the text.*rename the file to \.csv", read, path)
    renamed = put(tmp_path / "q.csv", 'text\tlabel\n"a ""fine"" film"\tpositive\n')
    assert read(renamed)[0]["text"] == ['a "fine" film']
    all_quoted = put(tmp_path / "all.tsv", '"text"\t"label"\n"a fine film"\t"positive"\n')
    data, reading = read(all_quoted)
    assert data["text"] == ["a fine film"] and reading.layout == "TSV with quoted fields"


@pytest.mark.parametrize(
    "name,content,line",
    [
        ("a.csv", "text,label\nok film,positive\na film, a plot,negative\n", "line 3 has 3 fields"),
        ("a.tsv", "text\tlabel\nok film\tpositive\na film\n", "line 3 has 1 field "),
        ("a.csv", 'text,label\n"two\nlines",positive\nfilm\n', "line 4 has 1 field "),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(tmp_path, name, content, line):
    refused(f"{line}.* 2", read, put(tmp_path / name, content))


# 2. Columns.


@pytest.mark.parametrize(
    "names,rows,texts",
    [
        ("id,text,label", [("x-1", "a fine film", "positive")], ("text",)),
        ("id,review_body,label", [("x-1", "a fine film", "positive")], ("review_body",)),
        (
            "code,remark,label",
            [("x1", "a fine film", "positive"), ("y2", "bad", "negative")],
            ("remark",),
        ),
        (
            "label,premise,hypothesis",
            [("positive", "a film", "a fine film")],
            ("premise", "hypothesis"),
        ),
        ("question,sentence,label", [("is it?", "it is", "positive")], ("question", "sentence")),
        ("text,title,label", [("a fine film", "The Film", "positive")], ("text",)),
        ("Sentence,Label", [("a fine film", "positive")], ("Sentence",)),
        (",text,label", [("0", "a fine film", "positive")], ("text",)),
    ],
)
def test_columns_are_chosen_by_name_and_content(tmp_path, names, rows, texts):
    path = put(
        tmp_path / "t.csv", "\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n"
    )
    data, reading = read(path)
    assert reading.text_columns == texts and len(data["text"]) == len(rows)
    assert data["text"][0] == rows[0][names.split(",").index(texts[0])]
    assert set(data) == {"text", "label"} | ({"text_pair"} if len(texts) == 2 else set())


def test_two_readings_are_asked_about_with_the_choices(tmp_path):
    path = put(tmp_path / "t.csv", "title,body,label\nThe film,a fine film,positive\n")
    message = refused("title.*body.*text_column_names", read, path)
    assert "title,body" in message
    assert read(path, text_column_names=["body"])[0]["text"] == ["a fine film"]
    both = read(path, text_column_names=["title", "body"])[0]
    assert (both["text"], both["text_pair"]) == (["The film"], ["a fine film"])
    refused("named as text and as label", read, path, text_column_names=["label"])
    refused("not body, none", read, path, text_column_names=["body", "none"])


def test_a_file_without_names_of_columns_is_refused(tmp_path):
    path = put(tmp_path / "t.csv", "this was a fine film,positive\nthat was not so good,negative\n")
    refused("first line looks like an example", load_files, path, path)


def test_validation_is_read_by_the_columns_of_training(tmp_path):
    train = put(tmp_path / "t.csv", "body,label\na fine film,x\na bad film,y\n")
    both = put(tmp_path / "v.csv", "title,body,label\nThe film,a fine film,x\nAnother film,bad,y\n")
    task = load_files(train, both)
    assert task.validation["text"][:] == ["a fine film", "bad"]
    pair = put(tmp_path / "p.csv", "premise,hypothesis,label\na,b,x\nc,d,y\n")
    refused("1 text column.* has 2", load_files, train, pair)


# 3. Several labels.


def test_lists_of_labels_are_refused_by_name(tmp_path):
    rows = [("a fine film", ["a", "b"]), ("bad", ["a"])]
    lists = write(tmp_path / "t.jsonl", rows, ("text", "label"))
    refused("multi-label classification", load_files, lists, lists, model=MODEL)
    assert load_files(lists, lists).kind == "multi_label_classification"
    written = write(tmp_path / "t.csv", [(text, str(label)) for text, label in rows])
    refused("multi-label classification", load_files, written, written)


# 4. Words for missing values.


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_words_for_missing_values_are_data(tmp_path, suffix):
    words = ["None", "NA", "nan", "null", "N/A", "NaN", "<NA>", "n/a", "NULL", "#N/A"]
    path = tmp_path / f"t{suffix}"
    write(path, [(word, word) for word in words], ("text", "label"))
    task = load_files(str(path), str(path))
    assert task.train["text"][:] == words and task.label_names == tuple(sorted(words))
    assert [task.label_names[number] for number in task.train["label"]] == words


def test_a_trailing_comma_in_every_row_is_no_column(tmp_path):
    for head in ("text,label", "text,label,"):
        path = put(tmp_path / "t.csv", f"{head}\na fine film,positive,\nbad,negative,\n")
        data, reading = read(path)
        assert data == {"text": ["a fine film", "bad"], "label": [1, 0]} and reading.notes
    some = put(tmp_path / "s.csv", "text,label\na fine film,positive,\nbad,negative\n")
    refused("line 2 has 3 fields", read, some)


# 5. Numbers, encodings, delimiters.


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_decimal_zeros_and_ones_are_classes(tmp_path, suffix):
    rows = [("a fine film", 1.0), ("bad", 0.0)] * 3
    path = write(tmp_path / f"t{suffix}", rows, ("text", "label"))
    task = load_files(path, path)
    assert task.label_names == ("0", "1") and task.train["label"][:2] == [1, 0]
    data, reading = read(path)
    assert data["label"][:2] == [1, 0] and reading.written == {"0": "negative", "1": "positive"}
    assert load_files(path, path, problem_type="regression").train["label"][:2] == [1.0, 0.0]
    assert load_files(path, path, model=SCORE).is_regression


def test_leading_zeros_stay(tmp_path):
    path = put(tmp_path / "t.csv", "text,label\na film,02\nthe film,01\nthis film,10\n")
    assert load_files(path, path).label_names == ("01", "02", "10")


def test_a_model_with_one_output_takes_zeros_and_ones_as_scores(tmp_path):
    path = put(tmp_path / "t.csv", "query,passage,label\na b,c d,1\ne f,g h,0\n")
    data, reading = read(path, SCORE)
    assert data["label"] == [1.0, 0.0] and "taken as scores" in reading.notes[-1]
    assert load_files(path, path, model=SCORE).label_names is None
    words = put(tmp_path / "w.csv", "text,label\na b,good\n")
    refused("no finite numbers", read, words, SCORE)


def test_fractions_are_scores_and_excels_commas_too(tmp_path):
    path = put(tmp_path / "t.csv", "text;label\nA, b;0,5\nc d;3,25\n")
    assert load_files(path, path).train["label"][:] == [0.5, 3.25]
    refused("labels that the model lacks: 0.5", read, path)
    commas = put(tmp_path / "c.csv", 'text,label\na b,"1,2"\nc d,"3,4"\n')
    assert load_files(commas, commas).label_names == ("1,2", "3,4")


def config(names, **more):
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)), **more)


def test_names_of_classes_that_cannot_be_used_are_refused():
    refused("calls a class 5 in id2label.*in quotes", ModelLabels.of, config([5, 7]), "model")
    refused("calls two classes 'a'.*its own name", ModelLabels.of, config(["a", "a"]), "model")
    multi = config(["a", "b"], problem_type="multi_label_classification")
    assert ModelLabels.of(multi, "model") == ModelLabels(2, ("a", "b"), several=True)
    refused("2 scores", ModelLabels.of, config(["a", "b"], problem_type="regression"), "model")
    assert ModelLabels.of(config(["LABEL_0", "LABEL_1"]), "model") == ModelLabels(2, None)
    assert ModelLabels.of(config(["0", "1"]), "model").names == ("0", "1")


def test_a_text_column_of_numbers_is_taken_if_it_is_the_only_one_or_named(tmp_path):
    named = put(tmp_path / "t.csv", "text,label\n007,positive\n42,negative\n")
    assert read(named)[0]["text"] == ["007", "42"]
    only = write(tmp_path / "t.parquet", [(7, "positive"), (42, "negative")], ("number", "label"))
    assert read(only)[0]["text"] == ["7", "42"]
    identifier = put(tmp_path / "i.csv", "id,label\n1,positive\n2,negative\n")
    refused("text columns are needed", read, identifier)
    assert read(identifier, text_column_names=["id"])[0]["text"] == ["1", "2"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_second_text_is_empty_and_counted_a_missing_first_one_refused(tmp_path, suffix):
    rows = [("a b", "c d", "positive"), ("e f", None, "negative"), ("g h", "i j", "positive")]
    names = ("sentence1", "sentence2", "label")
    data, reading = read(write(tmp_path / f"t{suffix}", rows, names))
    where = "row 2" if suffix == ".parquet" else "line 3" if suffix == ".csv" else "line 2"
    assert data["text_pair"] == ["c d", "", "i j"]
    assert f"empty texts in 'sentence2': 1 ({where})" in reading.notes
    swapped = write(tmp_path / f"s{suffix}", rows, ("sentence2", "sentence1", "label"))
    refused(f"without text or label .{where}", read, swapped)
    unlabelled = write(tmp_path / f"u{suffix}", [("a b", None), ("c d", "positive")])
    refused("without text or label", read, unlabelled)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters_of_spreadsheets(tmp_path, encoding, delimiter):
    text = f"text{delimiter}label\r\nça va, très bien{delimiter}positive\r\n"
    text = text if delimiter != "," else text.replace("ça va, très bien", '"ça va, très bien"')
    data, _ = read(put(tmp_path / "t.csv", text.encode(encoding)))
    assert data == {"text": ["ça va, très bien"], "label": [1]}


def test_other_encodings_and_ambiguous_delimiters_are_refused(tmp_path):
    latin = put(
        tmp_path / "l.csv", "text,label\nok film,positive\nça va,positive\n".encode("latin-1")
    )
    refused("not text in UTF-8 .* line 3.*save it as UTF-8", read, latin)
    unmarked = put(tmp_path / "u.csv", "text,label\na b,positive\n".encode("utf-16-le"))
    refused("UTF-16 needs its byte order mark", read, unmarked)
    both = put(tmp_path / "b.csv", "a;b,label\n1;2,3\n4;5,6\n")
    refused("commas or semicolons, and both fit", read_table, both)
    hint = put(tmp_path / "s.csv", "sep=;\ntext;label\na b;positive\n")
    assert read(hint)[0]["text"] == ["a b"]


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
    refused("labels that the model lacks: 1, 2", read, numbers)
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
