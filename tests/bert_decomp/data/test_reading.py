"""Files that people really have: the right value is read, or the refusal says how to write it."""

import tracemalloc
from types import SimpleNamespace

import pytest
from cases import write
from data.reading_cases import MODEL, SCORE, put, read, refused

from bert_decomp.data.delimited import read_csv
from bert_decomp.data.files import load_files
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.tables import read_table

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


def test_a_field_of_megabytes_takes_a_few_times_its_size(tmp_path):
    size = 4 * 2**20
    path = put(tmp_path / "t.csv", "text,label\n" + "a" * size + ",negative\n")
    tracemalloc.start()
    table = read_csv(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table.columns["text"][0]) == size
    # The text, its line and its field, and four bytes a character in the parser of the standard library.
    assert peak < 8 * size
