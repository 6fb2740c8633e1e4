"""Scores of pairs: cross-encoders in and out, graded labels, rankings of each query."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_resumed_is_uninterrupted, write
from kinds.shared import run_commands, uncut
from sentence_transformers import CrossEncoder
from sklearn.metrics import ndcg_score
from tiny_models import ANIMALS, COLOURS, tiny_model

from bert_decomp import fuse_
from bert_decomp.data.files import ReadOptions
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.errors import UserError
from bert_decomp.kinds import REGRESSION, RERANKING, kind_of
from bert_decomp.models.folders import kind_of_folder
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save

NAMES = ("query", "passage", "label")


def rows(best=1):
    texts = [f"a {colour} {animal}" for colour in COLOURS for animal in ANIMALS[:3]]
    return [
        (f"the {animal}", text, best * (animal in text)) for animal in ANIMALS[:3] for text in texts
    ]


def pairs():
    return [(query, text) for query, text, _ in rows()]


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder as sentence-transformers writes it."""
    tiny_model("bert", num_labels=1).save_pretrained(tmp_path / "raw")
    tokenizer.save_pretrained(tmp_path / "raw")
    CrossEncoder(str(tmp_path / "raw"), device="cpu").save_pretrained(str(tmp_path / "cross"))
    return str(tmp_path / "cross")


def scores_of(model, tokenizer):
    batch = dict(
        tokenizer(*map(list, zip(*pairs(), strict=True)), padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        return model(**batch).logits.flatten()


def read(path):
    return RERANKING.read_held_out(path, ReadOptions(model=ModelLabels(1, None)))


def test_scores_are_sentence_transformers_own_in_every_form(tmp_path, tokenizer, folder):
    assert (
        kind_of_folder(folder) is RERANKING and kind_of_folder(str(tmp_path / "raw")) is REGRESSION
    )
    teacher = load_model(folder, RERANKING).eval()
    expected = scores_of(teacher, tokenizer)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for model in (teacher, uncut(teacher)):
        save(model, tokenizer, tmp_path / "out")
        again = CrossEncoder(str(tmp_path / "out"), device="cpu")
        for _ in range(2):
            found = torch.from_numpy(again.predict(pairs()))
            torch.testing.assert_close(found, expected.sigmoid(), **close)
            if not hasattr(again, "fused"):
                fuse_(again.model)
                again.fused = True
        loaded = load_model(str(tmp_path / "out"), RERANKING).eval()
        assert torch.equal(scores_of(loaded, tokenizer), scores_of(model, tokenizer))
    made = load_model(str(tmp_path / "raw"), RERANKING).eval()
    save(made, tokenizer, tmp_path / "made")
    found = CrossEncoder(str(tmp_path / "made"), device="cpu").predict(pairs())
    torch.testing.assert_close(torch.from_numpy(found), expected.sigmoid(), **close)


def test_older_folders_are_recognised_by_their_config(tmp_path, tokenizer):
    old = {
        "sentence_transformers": {
            "activation_fn": "torch.nn.modules.linear.Identity",
            "version": "4.0.0",
        }
    }
    save(tiny_model("bert", num_labels=1, **old), tokenizer, tmp_path / "old")
    assert kind_of_folder(str(tmp_path / "old")) is RERANKING


def test_rankings_are_those_counted_by_hand():
    draw = np.random.default_rng(0)
    query, labels, scores = (
        draw.integers(0, 6, 60),
        draw.integers(0, 4, 60) / 3,
        draw.normal(size=60),
    )
    query[0], query[1:3], labels[1:3] = 6, 7, 0
    found = RERANKING.metrics(scores[:, None], {"labels": labels, "query": query})
    gains, ranks = [], []
    for number in range(6):
        part = query == number
        gains.append(ndcg_score([labels[part]], [scores[part]], k=10))
        order = sorted(np.flatnonzero(part), key=lambda i: -scores[i])[:10]
        ranks.append(next((1 / (r + 1) for r, i in enumerate(order) if labels[i] >= 0.5), 0))
    assert list(found) == ["ndcg_at_10", "mrr_at_10", "spearmanr", "pearson"]
    assert (found["ndcg_at_10"], found["mrr_at_10"]) == (
        pytest.approx(np.mean(gains)),
        pytest.approx(np.mean(ranks)),
    )
    alone = {"labels": labels, "query": np.arange(60)}
    assert list(RERANKING.metrics(scores[:, None], alone)) == ["spearmanr", "pearson"]


def test_grades_are_shares_of_the_best_and_what_is_none_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.csv", rows(best=3), NAMES)
    task = RERANKING.read(path, path, ReadOptions())
    assert task.kind == "reranking" and set(task.train["label"]) == {0.0, 1.0}
    assert "divided by the best grade, 3" in task.readings["train"].notes[-1]
    assert read(path)[0]["label"][:] == task.validation["label"][:]
    encoded = RERANKING.encode(task.train, tokenizer, 20)
    assert encoded["query"][:] == [i // 12 for i in range(36)]
    negative = write(tmp_path / "b.csv", [("a b", "c d", -1), ("e f", "g h", 1)], NAMES)
    single = write(tmp_path / "c.csv", [("a b", 1), ("c d", 0)], ("text", "label"))
    for wrong, word in ((negative, "labels from -1 to 1"), (single, "one text a row")):
        with pytest.raises(UserError, match=word):
            read(wrong)


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one_and_its_loss_is_cross_entropy(
    tmp_path, tokenizer, folder
):
    data = RERANKING.encode(read(write(tmp_path / "a.csv", rows(), NAMES))[0], tokenizer, 20)
    teacher = load_model(folder, RERANKING)
    teacher.config.problem_type = RERANKING.problem_type
    trainer = assert_resumed_is_uninterrupted(
        tmp_path, tokenizer, terms=PRESETS["best"], teacher=teacher, data=data
    )
    batch = {"labels": torch.tensor([1.0, 0.0, 0.3])}
    outputs = type("Outputs", (), {"logits": torch.tensor([[2.0], [-1.0], [0.5]])})
    p = outputs.logits.flatten().sigmoid()
    expected = -(batch["labels"] * p.log() + (1 - batch["labels"]) * (1 - p).log()).mean()
    torch.testing.assert_close(kind_of(trainer.model).task_loss(outputs, batch), expected)
    assert not torch.isclose(F.mse_loss(outputs.logits.flatten(), batch["labels"]), expected)


@pytest.mark.slow
def test_the_guides_commands(tmp_path, tokenizer, monkeypatch, folder, encoder_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "cross").rename(tmp_path / "path/to/cross-encoder")
    encoder_folder.rename(tmp_path / "path/to/encoder")
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.csv", rows(), NAMES)
        groups = {}
        for query, text, label in rows():
            groups.setdefault(query, ([], []))[1 - label].append(text)
        lists = [(query, *texts) for query, texts in groups.items()]
        write(tmp_path / f"{name}.jsonl", lists, ("query", "positive", "negative"))
    run_commands("reranking.md")
    metrics = json.loads((tmp_path / "runs/reranker/results.json").read_text())["metrics"]
    assert list(metrics["teacher"]) == ["ndcg_at_10", "mrr_at_10", "spearmanr", "pearson"]
    for run in ("reranker", "new", "lists"):
        found = CrossEncoder(str(tmp_path / "runs" / run / "model"), device="cpu").predict(pairs())
        assert found.shape == (36,) and np.all((found > 0) & (found < 1))
