"""Predictions of files are those of transformers and sentence-transformers, in order."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from prediction.files import ROWS, saved, texts, written
from prediction.refusals import refused
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main
from bert_decomp.data import windows
from bert_decomp.data.windows import TextSource
from bert_decomp.models.saving import save
from bert_decomp.prediction.predict import predict


@torch.no_grad()
def logits(folder, first, second=None):
    """One text at a time through transformers, without fusing or padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = first if second is None else zip(first, second, strict=True)
    encoded = [
        tokenizer(
            *([pair] if second is None else pair),
            truncation=True,
            max_length=40,
            return_tensors="pt",
        )
        for pair in pairs
    ]
    return np.concatenate([model(**one).logits.numpy() for one in encoded])


def close(found, wanted):
    assert np.abs(np.array(found) - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_every_file_gives_the_answers_of_transformers(kind, model, table, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_ROWS", 20)
    output = tmp_path / "out.parquet"
    keep = ["id", "n"]
    done = predict(
        model, written(tmp_path, table, kind), output, keep_columns=keep, batch_tokens=90
    )
    found = pq.read_table(output)
    wanted = torch.tensor(logits(model, texts())).softmax(-1).numpy()
    assert (done.rows, done.texts) == (ROWS, ROWS) and not list(tmp_path.glob("*.parts"))
    assert found.column_names == ["id", "n", "label", "score", "scores"]
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert [int(n) for n in found["n"].to_pylist()] == list(range(ROWS))
    assert found.schema.field("n").type == (pa.string() if kind == "csv" else pa.int64())
    close(found["scores"].to_pylist(), wanted)
    close(found["score"].to_pylist(), wanted.max(-1))
    names = ["cold", "mild", "hot"]
    assert found["label"].to_pylist() == [names[i] for i in wanted.argmax(-1)]


@pytest.mark.parametrize(
    "problem, labels", [("multi_label_classification", 3), ("regression", 1), ("regression", 2)]
)
def test_several_labels_and_scores_of_pairs(problem, labels, tmp_path):
    folder = saved(tmp_path / "model", problem_type=problem, num_labels=labels, num_hidden_layers=1)
    first, second = texts(9), texts(10)[::-1][:9]
    Dataset.from_dict({"sentence1": first, "sentence2": second}).to_json(tmp_path / "in.jsonl")
    predict(folder, str(tmp_path / "in.jsonl"), tmp_path / "out.parquet")
    found, wanted = pq.read_table(tmp_path / "out.parquet"), logits(folder, first, second)
    if problem == "regression":
        close(
            found["score" if labels == 1 else "scores"].to_pylist(),
            wanted.squeeze(-1) if labels == 1 else wanted,
        )
        return
    wanted = torch.tensor(wanted).sigmoid().numpy()
    close(found["scores"].to_pylist(), wanted)
    chosen = [[f"LABEL_{i}" for i in range(labels) if row[i] >= 0.5] for row in wanted]
    assert found["labels"].to_pylist() == chosen
    assert 0 < sum(map(len, chosen)) < labels * len(chosen)


@pytest.mark.parametrize("modes, normalise", [("mean", True), (("cls", "max"), False)])
def test_vectors_are_those_of_sentence_transformers(modes, normalise, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 38  # MPNet's positions start at 2
    save(tiny_model("mpnet").base_model, tokenizer, tmp_path / "bare")
    parts = [Transformer(str(tmp_path / "bare")), Pooling(36, pooling_mode=modes)]
    encoder = SentenceTransformer(
        modules=[*parts, *([Normalize()] if normalise else [])], device="cpu"
    )
    encoder.save(str(tmp_path / "encoder"))
    Dataset.from_dict({"text": texts()}).to_parquet(tmp_path / "in.parquet")
    predict(str(tmp_path / "encoder"), str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()
    close(found, encoder.encode(texts()))
    with pytest.raises(ValueError, match=r"bare encoder without modules\.json"):
        predict(str(tmp_path / "bare"), str(tmp_path / "in.parquet"), tmp_path / "b.parquet")


def test_int8_is_calibrated_on_the_first_texts(model, table, tmp_path):
    path = written(tmp_path, table)
    exact, small = tmp_path / "exact.parquet", tmp_path / "small.parquet"
    assert command(main, [model, path, "--output", str(exact)]) == 0
    assert command(main, [model, path, "--output", str(small), "--int8"]) == 0
    exact, small = (np.array(pq.read_table(one)["scores"].to_pylist()) for one in (exact, small))
    assert 0 < np.abs(exact - small).max() < 0.1


@pytest.mark.parametrize(
    "name, content, options, words",
    [
        ("a.csv", "id,text\n1,a b\n2,c d,e\n", [], "line 3 has 3 fields where the header has 2"),
        ("a.csv", "id,text\n1,a b\n2,\n", [], "rows without text or label (line 3: 'text')"),
        ("a.csv", 'id,text\n1,a b\n2,"c\n', [], "the row that begins at line 3"),
        ("a.csv", b"id,text\n1,a b\n2,\xff\n", [], "not text in UTF-8"),
        ("a.csv", "id,text\n1,a b\n", ["--keep_columns", "x"], "no column 'x' to keep"),
        ("a.csv", "id,text\n1,a b\n", ["--text_column_names", "x"], "--text_column_names"),
        ("a.csv", "score,text\n1,a b\n", ["--keep_columns", "all"], "the name of an answer"),
        ("a.csv", "id,text\n", [], "holds no rows"),
        ("a.jsonl", '{"text": "a b"}\n[1]\n', [], "line 2 is no object"),
        (
            "a.jsonl",
            '{"text": "a b"}\n{"text": 1}\n',
            [],
            "line 2: the column 'text' holds no text",
        ),
        ("a.jsonl", '[{"text": "a b"}]', [], "give JSON-lines"),
        (
            "a.jsonl",
            '{"text": "a b", "id": 1}\n{"text": "a b", "id": "x"}\n',
            ["--keep_columns", "id"],
            "different types",
        ),
        ("a.parquet", "no", [], "cannot be read as parquet"),
        ("a.tsv", "id\ttext\n", [], "cannot read texts from files ending in '.tsv'"),
        ("a.csv", "id,text\n1,a b\n", ["--batch_tokens", "0"], "--batch_tokens is 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    name, content, options, words, model, tmp_path, capsys
):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    line = [model, str(tmp_path / name), "--output", str(tmp_path / "out.parquet"), *options]
    refused(capsys, line, words)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 2**15)
    peaks = {}
    for kind in ("csv", "parquet", "jsonl"):
        for rows in (1500, 6000):
            table = pa.table(
                {"id": ["r"] * rows, "n": range(rows), "text": ["the red owl " * 80] * rows}
            )
            path = written(tmp_path, table, kind)
            tracemalloc.start()
            counted = sum(len(window) for window in TextSource.open(path).windows())
            peaks[kind, rows] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert counted == rows
        assert peaks[kind, 6000] < 1.5 * peaks[kind, 1500], peaks
