"""Any number of labels an example: read, numbered, distilled, scored, saved with thresholds."""

import copy
import json
from itertools import product

import numpy as np
import pytest
import torch
from cases import assert_resumed_is_uninterrupted, write
from datasets import ClassLabel, Dataset, Features, List, Value
from kinds.shared import run_commands, uncut
from sklearn.metrics import average_precision_score, f1_score
from tiny_models import ANIMALS, COLOURS, FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp import DecompositionConfig, decompose_, fuse_
from bert_decomp.data.batches import batches, encode
from bert_decomp.data.files import load_files, load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import MULTI_LABEL, kind_of
from bert_decomp.kinds.multi_label import MultiLabel, best_threshold
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save
from bert_decomp.prediction.answers import answers_of

NAMES = ("red", "cat", "dog")
CONFIG = {
    "num_labels": 3,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
    "problem_type": "multi_label_classification",
}


def rows():
    texts = [f"the {a} {b} sees a {c}" for a, b, c in product(COLOURS, ANIMALS[:3], ANIMALS[:3])]
    return [(text, [name for name in NAMES if name in text.split()]) for text in texts]


def labelled_batch():
    batch = tiny_batch(7)
    return {**batch, "labels": torch.randint(0, 2, (7, 3)).float()}


def test_lists_and_columns_are_read_alike(tmp_path):
    lists = write(tmp_path / "a.jsonl", rows(), ("text", "label"))
    flags = [(text, *(int(name in labels) for name in NAMES)) for text, labels in rows()]
    columns = write(tmp_path / "b.csv", flags, ("text", *NAMES))
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=list(NAMES)))})
    numbered = [(text, [NAMES.index(name) for name in labels]) for text, labels in rows()]
    table = [dict(zip(("text", "label"), row, strict=True)) for row in numbered]
    Dataset.from_list(table, features=features).to_parquet(str(tmp_path / "c.parquet"))
    model = ModelLabels.named(*NAMES, several=True)
    found = [
        load_labelled(lists, model)[0],
        load_labelled(columns, model, label_column_name=",".join(NAMES))[0],
        load_labelled(str(tmp_path / "c.parquet"), model)[0],
        load_labelled(write(tmp_path / "d.jsonl", numbered, ("text", "label")), model)[0],
    ]
    assert all(part["label"][:] == found[0]["label"][:] for part in found)
    assert found[0]["label"][0] == [float(name in rows()[0][1]) for name in NAMES]
    task = load_files(columns, columns, label_column_name="red,cat,dog")
    assert (task.kind, task.label_names) == (MULTI_LABEL.name, NAMES)
    assert load_files(lists, None).label_names == ("cat", "dog", "red")


@pytest.mark.parametrize(
    "file,problem,word",
    [
        ([("a", ["red"]), ("b", "cat")], None, "not there"),
        ([("a", ["red"]), ("b", None)], None, "not there"),
        ([("a", ["red"]), ("b", [["x"]])], None, "not there"),
        ([("a", ["red"]), ("b", [])], "regression", "one label an example"),
        ([("a", "red"), ("b", "cat")], MULTI_LABEL.name, "has one label a row"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, file, problem, word):
    path = write(tmp_path / "a.jsonl", file, ("text", "label"))
    with pytest.raises(UserError, match=word):
        load_files(path, path, problem_type=problem)


def test_models_of_another_kind_are_refused(tmp_path):
    lists = write(tmp_path / "a.jsonl", rows(), ("text", "label"))
    plain = write(tmp_path / "b.jsonl", [("a", "red"), ("b", "cat")], ("text", "label"))
    with pytest.raises(UserError, match="the model has one label an example"):
        load_files(lists, lists, model=ModelLabels.named(*NAMES))
    with pytest.raises(UserError, match="one label a row"):
        load_files(plain, plain, model=ModelLabels.named(*NAMES, several=True))
    with pytest.raises(UserError, match="one label a row"):
        load_files(lists, plain)
    wrong = write(tmp_path / "c.csv", [("a b", 1, 0), ("c d", 2, 0)], ("text", "x", "y"))
    with pytest.raises(UserError, match=r"line 3: the column 'x'.*0 or 1, not '2'"):
        load_files(wrong, wrong, label_column_name="x,y")
    with pytest.raises(UserError, match="thresholds"):
        kind_of(tiny_model("bert", **CONFIG, thresholds=[0.5, 2, 0.5]))


def test_metrics_are_scikit_learns_over_labels_that_occur():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(50, 4)), draw.integers(0, 2, (50, 4)).astype(float)
    labels[:, 3] = 0
    found = MultiLabel((0.5, 0.3, 0.6, 0.5)).metrics(logits, {"labels": labels})
    given = 1 / (1 + np.exp(-logits)) > (0.5, 0.3, 0.6, 0.5)
    assert found == {
        "f1_micro": pytest.approx(f1_score(labels, given, average="micro")),
        "f1_macro": pytest.approx(f1_score(labels[:, :3], given[:, :3], average="macro")),
        "average_precision": pytest.approx(
            average_precision_score(labels[:, :3], logits[:, :3], average="macro")
        ),
    }
    assert MULTI_LABEL.metrics(logits, {"labels": 0 * labels})["average_precision"] == 0


@pytest.mark.slow
def test_the_threshold_is_the_best_of_all():
    draw = np.random.default_rng(1)
    for _ in range(20):
        labels = draw.integers(0, 2, 15)
        scores = np.round(draw.random(15) * 0.7 + 0.3 * labels, 1)
        chosen = best_threshold(scores, labels)
        best = max(
            f1_score(labels, scores > cut, zero_division=0) for cut in np.arange(-0.05, 1, 0.05)
        )
        assert f1_score(labels, scores > chosen, zero_division=0) == pytest.approx(best)


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_a_new_head_starts_at_the_frequency_of_each_label(family):
    model = tiny_model(family, **CONFIG)
    train = Dataset.from_dict({"labels": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]})
    MULTI_LABEL.start_(model, train)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_()
        batch = {name: value for name, value in tiny_batch(2).items() if name != "labels"}
        found = model(**batch).logits.sigmoid()
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.4, 0.2]] * 2))


def test_the_comparison_is_the_divergence_of_each_label():
    student, teacher = torch.randn(2, 6, 3, dtype=torch.float64)
    p, q = (torch.stack([x / 2, -x / 2]).sigmoid() for x in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum() / 6
    torch.testing.assert_close(MULTI_LABEL.compare(student, teacher, 2.0), expected)
    assert MULTI_LABEL.compare(teacher, teacher, 2.0) == 0


def test_the_sampled_loss_has_the_fisher_information_of_independent_labels():
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(4000):
        drawing = torch.Generator().manual_seed(seed)
        (gradient,) = torch.autograd.grad(MULTI_LABEL.sampled_loss(logits, 2.0, drawing), logits)
        total += gradient.T @ gradient / 4000
    p = (logits.detach() / 2).sigmoid()[0]
    torch.testing.assert_close(total, torch.diag(p * (1 - p) / 4), rtol=0.1, atol=4e-3)


def test_nothing_cut_fused_saved_and_loaded_are_the_teacher(tmp_path, tokenizer):
    teacher, batch = tiny_model("bert", **CONFIG, thresholds=[0.4, 0.5, 0.6]), labelled_batch()
    before = evaluate(teacher, [batch], progress=False)
    student = uncut(teacher)
    decompose_(
        copy.deepcopy(teacher), DecompositionConfig(encoder_fraction=0.5), [batch], progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(
            student(**batch).logits, teacher(**batch).logits, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            fuse_(copy.deepcopy(student))(**batch).logits,
            student(**batch).logits,
            rtol=1e-4,
            atol=1e-5,
        )
    save(student, tokenizer, tmp_path / "student")
    loaded = load_model(str(tmp_path / "student")).eval()
    assert torch.equal(loaded(**batch).logits, student(**batch).logits)
    assert kind_of(loaded) == MultiLabel((0.4, 0.5, 0.6))
    assert evaluate(loaded, [batch], progress=False) == pytest.approx(before, abs=1e-3)


def test_predictions_give_labels_by_the_thresholds(tmp_path, tokenizer):
    save(tiny_model("bert", **CONFIG, thresholds=[0.1, 0.5, 0.9]), tokenizer, tmp_path / "model")
    answers = answers_of(str(tmp_path / "model"))
    logits = np.log(np.array([[0.2, 0.2, 0.8], [0.05, 0.6, 0.95]], np.float32) / 0.5)
    shares = 1 / (1 + np.exp(-logits))
    given = answers.columns(logits)["labels"].to_pylist()
    cuts = np.array([0.1, 0.5, 0.9])
    assert given == [
        [n for n, yes in zip(NAMES, row >= cuts, strict=True) if yes] for row in shares
    ]
    assert given[0] != given[1] != [*NAMES]


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", rows(), ("text", "label"))
    data = encode(load_labelled(path, ModelLabels.named(*NAMES, several=True))[0], tokenizer, 20)
    teacher = tiny_model("bert", **CONFIG)
    assert_resumed_is_uninterrupted(
        tmp_path, tokenizer, steps=8, terms=PRESETS["best"], teacher=teacher, data=data
    )
    assert batches(data, tokenizer, 4)[0]["labels"].shape == (4, 3)


@pytest.mark.slow
def test_the_guides_commands(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny_model("bert", **CONFIG), tokenizer, tmp_path / "path" / "to" / "model")
    tiny_model("bert").base_model.save_pretrained(tmp_path / "path" / "to" / "encoder")
    tokenizer.save_pretrained(tmp_path / "path" / "to" / "encoder")
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", rows(), ("text", "label"))
    flags = [(text, *(int(name in labels) for name in NAMES)) for text, labels in rows()]
    write(tmp_path / "train.csv", flags, ("text", *NAMES))
    run_commands("multi-label.md")
    config = json.loads((tmp_path / "runs/columns/model/config.json").read_text())
    assert len(config["thresholds"]) == 3 and list(config["id2label"].values()) == list(NAMES)
    metrics = json.loads((tmp_path / "runs/labels/results.json").read_text())["metrics"]
    assert list(metrics["teacher"]) == ["f1_micro", "f1_macro", "average_precision"]
    data = json.loads((tmp_path / "runs/labels/data.json").read_text())["splits"][0]
    assert data["kind"] == "sets of labels" and data["classes"]["red"] == 9
