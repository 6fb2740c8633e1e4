"""``python -m bert_decomp.evaluate`` on dense and low-rank folders, on files and GLUE, and on what it must refuse."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import write, write_glue
from tiny_models import tiny_batch, tiny_model, write_csv

from bert_decomp.cli.command import command
from bert_decomp.cli.evaluate import main
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.evaluation.metrics import evaluate, main_metric, metrics_of
from bert_decomp.models.saving import save


def saved(folder, tokenizer, rank=None, **changes):
    model = tiny_model("bert", **changes)
    if rank is not None:
        decompose_(model, DecompositionConfig("svd", rank=rank), progress=False)
    save(model, tokenizer, folder)
    return str(folder)


NAMES = {
    "num_labels": 2,
    "id2label": {0: "plain", 1: "coloured"},
    "label2id": {"plain": 0, "coloured": 1},
}


@pytest.mark.parametrize("rank", [None, 5])
def test_a_file_is_judged_by_the_models_own_labels(tmp_path, tokenizer, capsys, rank):
    """Against the labels turned about, a two-class model is right exactly where it was wrong."""
    model, path = (
        saved(tmp_path / "model", tokenizer, rank, **NAMES),
        write_csv(tmp_path / "dev.csv", 40),
    )
    assert (
        command(
            main,
            [
                model,
                "--file",
                str(path),
                "--batch_size",
                "7",
                "--output_file",
                str(tmp_path / "m.json"),
            ],
        )
        == 0
    )
    found = json.loads((tmp_path / "m.json").read_text())
    assert (
        found["examples"] == 40
        and f"accuracy {found['metrics']['accuracy']:.4f}" in capsys.readouterr().out
    )
    turned = (
        path.read_text()
        .replace(",plain", ",x")
        .replace(",coloured", ",plain")
        .replace(",x", ",coloured")
    )
    (tmp_path / "turned.csv").write_text(turned)
    assert (
        command(
            main,
            [
                model,
                "--file",
                str(tmp_path / "turned.csv"),
                "--output_file",
                str(tmp_path / "t.json"),
            ],
        )
        == 0
    )
    other = json.loads((tmp_path / "t.json").read_text())["metrics"]
    assert found["metrics"]["accuracy"] + other["accuracy"] == pytest.approx(1)


def test_glue_leads_with_its_metric_and_mnli_has_both_splits(tmp_path, tokenizer):
    for name, labels in (
        ("mnli", ("entailment", "neutral", "contradiction")),
        ("cola", ("unacceptable", "acceptable")),
    ):
        write_glue(tmp_path / "glue", name)
        model = saved(
            tmp_path / name,
            tokenizer,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        assert (
            command(
                main,
                [
                    model,
                    "--task_name",
                    name,
                    "--data_dir",
                    str(tmp_path / "glue"),
                    "--output_file",
                    str(tmp_path / f"{name}.json"),
                ],
            )
            == 0
        )
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        for name in ("mnli", "cola")
    }
    assert list(found["mnli"]) == [
        f"{metric}{split}"
        for split in ("", "_mismatched")
        for metric in ("accuracy", "f1", "matthews_correlation")
    ]
    assert main_metric(found["cola"]) == "matthews_correlation"


def test_regression_and_integer_labels(tmp_path, tokenizer):
    scores = write(tmp_path / "s.csv", [("a cat", 0.5), ("a dog sees", 2.5), ("the red hen", 1.0)])
    model = saved(tmp_path / "score", tokenizer, num_labels=1)
    assert command(main, [model, "--file", scores, "--output_file", str(tmp_path / "s.json")]) == 0
    assert set(json.loads((tmp_path / "s.json").read_text())["metrics"]) == {"spearmanr", "pearson"}
    numbers = write(tmp_path / "n.tsv", [("a cat", 0), ("a dog sees", 2), ("the red hen", 2)])
    assert command(main, [saved(tmp_path / "three", tokenizer), "--file", numbers]) == 0


def test_further_splits_follow_under_their_names():
    model, batch = tiny_model("bert"), tiny_batch(9)
    found = evaluate(model, [batch], progress=False, leading="f1", others={"again": [batch]})
    assert list(found)[:2] == ["f1", "accuracy"]
    assert all(
        found[f"{name}_again"] == found[name] for name in ("accuracy", "f1", "matthews_correlation")
    )
    assert metrics_of(np.eye(3), np.arange(3), "f1") == metrics_of(np.eye(3), np.arange(3))


@pytest.mark.parametrize(
    "options,word",
    [
        (["--file", "odd.csv"], "labels that the model lacks: odd"),
        (["--file", "none.csv"], "no such file"),
        (["--file", "dev.csv", "--label_column_name", "klass"], "no column 'klass'"),
        (["--file", "dev.csv", "--batch_size", "0"], "at least 1"),
        (["--task_name", "questions"], "has 2 labels but the task"),
        (["--task_name", "nothing"], "unknown task"),
        (["--file", "dev.csv", "--data_dir", "x", "--max_seq_length", "2"], "least 3"),
    ],
)
def test_bad_requests_are_one_line_and_code_2(
    tmp_path, tokenizer, capsys, monkeypatch, options, word
):
    model = saved(tmp_path / "model", tokenizer, **NAMES)
    write_csv(tmp_path / "dev.csv", 10)
    write(tmp_path / "odd.csv", [("a cat", "odd"), ("a dog", "plain")])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert command(main, [model, *options]) == 2
    error = capsys.readouterr().err
    assert word in error.strip().splitlines()[-1] and "Traceback" not in error


def test_a_folder_that_is_no_classifier_is_refused(encoder_folder, tmp_path, capsys):
    path = write_csv(tmp_path / "dev.csv", 10)
    for folder, word in (
        (encoder_folder, "not a fine-tuned classifier"),
        (tmp_path / "none", "cannot load"),
    ):
        assert command(main, [str(folder), "--file", str(path)]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_as_a_command(tmp_path, tokenizer):
    model, path = saved(tmp_path / "model", tokenizer, **NAMES), write_csv(tmp_path / "dev.csv", 10)
    found = subprocess.run(
        [sys.executable, "-m", "bert_decomp.evaluate", model, "--file", str(path)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (
        found.returncode == 0
        and found.stdout.startswith("accuracy ")
        and "Warning" not in found.stderr
    )
