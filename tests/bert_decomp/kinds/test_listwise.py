"""Rerankers trained on queries with all their texts: files of groups, losses over lists, whole lists in every slice."""

import pytest
import torch
from cases import assert_resumed_is_uninterrupted, trainer_for, write
from distillation.test_slices import step
from tiny_models import ANIMALS, COLOURS, tiny_model

from bert_decomp.data.batches import batches, slices
from bert_decomp.data.files import ReadOptions
from bert_decomp.data.groups import read_pairs
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.distillation import resumable
from bert_decomp.distillation.losses import DistillationConfig
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import LISTWISE_RERANKING, RERANKING, kind_of
from bert_decomp.models.folders import kind_of_folder
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save


def groups():
    """(query, positives, negatives), of different sizes."""
    found = []
    for number, animal in enumerate(ANIMALS):
        texts = [f"a {colour} {other}" for colour in COLOURS for other in ANIMALS[: 2 + number % 3]]
        found.append(
            (
                f"the {animal}",
                [text for text in texts if animal in text] or [f"is the {animal} red"],
                [text for text in texts if animal not in text][: 5 + number],
            )
        )
    return found


def flat(rows=None):
    return [
        (query, text, label)
        for query, positives, negatives in rows or groups()
        for label, texts in (("1", positives), ("0", negatives))
        for text in texts
    ]


def held_out(tmp_path, rows=None):
    path = write(tmp_path / "held.jsonl", rows or groups(), ("query", "positive", "negative"))
    options = ReadOptions(model=ModelLabels(1, None))
    return LISTWISE_RERANKING.read_held_out(path, options)[0]


def encoded(tmp_path, tokenizer, rows=None):
    return LISTWISE_RERANKING.encode(held_out(tmp_path, rows), tokenizer, 20)


@pytest.fixture
def teacher(tmp_path, tokenizer):
    save(tiny_model("bert", num_labels=1, num_hidden_layers=1), tokenizer, tmp_path / "teacher")
    model = load_model(str(tmp_path / "teacher"), LISTWISE_RERANKING)
    model.config.problem_type = LISTWISE_RERANKING.problem_type
    return model.eval()


def test_every_file_of_groups_gives_the_same_pairs(tmp_path):
    rows = groups()
    graded = [(q, [*p, *n], [1] * len(p) + [0] * len(n)) for q, p, n in rows]
    numbered = [(q, p[0], *(n + [None] * 9)[:9]) for q, p, n in rows]
    names = ("anchor", "positive", *(f"negative_{i}" for i in range(1, 10)))
    paths = (
        write(tmp_path / "a.jsonl", rows, ("query", "pos", "neg")),
        write(tmp_path / "b.parquet", rows, ("question", "positives", "negatives")),
        write(tmp_path / "c.jsonl", graded, ("query", "documents", "labels")),
    )
    for path in paths:
        table = read_pairs(path)
        assert list(zip(*table.columns.values(), strict=True)) == flat()
        assert table.notes[-1] == f"groups: 5 queries with {len(flat())} texts"
    triplets = read_pairs(write(tmp_path / "d.csv", numbered, names))
    assert list(zip(*triplets.columns.values(), strict=True)) == flat(
        [(q, p[:1], n[:9]) for q, p, n in rows]
    )
    assert triplets.where([len(flat()) // 2]).startswith("line ")
    unlabelled = read_pairs(write(tmp_path / "e.jsonl", rows, ("query", "docs", "other")))
    assert list(unlabelled.columns) == ["query", "passage"]
    pairs = write(tmp_path / "f.csv", flat(), ("query", "passage", "label"))
    for kind in (RERANKING, LISTWISE_RERANKING):
        task = kind.read(paths[0], None, ReadOptions())
        assert task.kind == kind.name and not set(task.train["text"]) & set(task.validation["text"])
        again = kind.read(pairs, paths[1], ReadOptions())
        assert again.train.to_dict() == again.validation.to_dict()
        assert len(again.train) == len(flat())


@pytest.mark.parametrize("row, names, word", [
    (("a b", [], []), ("query", "positive", "negative"), "line 1: a query without texts"),
    (("a b", ["c", " "], []), ("query", "positive", "negative"), "none of them empty"),
    (("a b", [3], []), ("query", "positive", "negative"), "must hold a text or a list"),
    (("a b", ["c"], [1, 0]), ("query", "docs", "labels"), "as many texts as labels"),
    (("a b", ["c"], ["x"]), ("query", "docs", "labels"), "labels, which are numbers"),
])  # fmt: skip
def test_groups_that_do_not_fit_are_named(row, names, word, tmp_path):
    with pytest.raises(UserError, match=word):
        read_pairs(write(tmp_path / "a.jsonl", [row], names))


def test_losses_are_those_of_each_list(tmp_path, tokenizer):
    data = encoded(tmp_path, tokenizer, [*groups(), ("the owl", [], ["a red cat", "a red dog"])])
    (batch,) = batches(data, tokenizer, 99, LISTWISE_RERANKING.collator(tokenizer))
    torch.manual_seed(0)
    student, teacher = torch.randn(2, len(batch["labels"]), 1, dtype=torch.double)
    compared = supervised = 0.0
    for number in batch["group"].unique():
        rows = batch["group"] == number
        assert len(batch["query"][rows].unique()) == 1
        s, t, y = student[rows, 0], teacher[rows, 0], batch["labels"][rows].double()
        p = (t / 2).softmax(0)
        compared += rows.sum() * 4 * (p * (p.log() - (s / 2).log_softmax(0))).sum()
        if y.sum():
            supervised -= rows.sum() * (y / y.sum() * s.log_softmax(0)).sum()
    found = LISTWISE_RERANKING.compare_batch(student, teacher, 2.0, batch)
    torch.testing.assert_close(found, compared / len(student))
    outputs = type("Outputs", (), {"logits": student})
    torch.testing.assert_close(
        LISTWISE_RERANKING.task_loss(outputs, batch), supervised / len(student)
    )
    # A constant on all texts of a query changes nothing.
    shifted = student + batch["group"][:, None]
    torch.testing.assert_close(
        LISTWISE_RERANKING.compare_batch(shifted, teacher, 2.0, batch), found
    )


def test_lists_stay_whole_and_slices_have_the_gradients_of_the_batch(
    tmp_path, tokenizer, teacher, monkeypatch
):
    data = encoded(tmp_path, tokenizer)
    collator = LISTWISE_RERANKING.collator(tokenizer)
    (batch,) = batches(data, tokenizer, 99, collator)
    width = batch["input_ids"].shape[1]
    parts = slices(batch, 16 * width)
    seen = [set(part["group"].tolist()) for part in parts]
    assert len(parts) > 1 and sum(map(len, seen)) == len(data) == len(set().union(*seen))
    assert all(len(part["group"]) <= 16 or len(set(part["group"].tolist())) == 1 for part in parts)
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    gradients = []
    for tokens in (16 * width, 10**6):
        monkeypatch.setattr(resumable, "SLICE_TOKENS", tokens)
        trainer = trainer_for(
            tmp_path / str(tokens), tokenizer, teacher=teacher, data=data, collator=collator,
            terms=DistillationConfig({"logits": 1.0, "task": 1.0, "hidden": 1.0}),
        )  # fmt: skip
        assert trainer.kind == LISTWISE_RERANKING
        gradients.append(step(trainer, {n: v for n, v in batch.items() if n != "query"}))
    torch.testing.assert_close(*(loss for loss, _ in gradients), rtol=1e-5, atol=0)
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tokenizer, teacher):
    assert_resumed_is_uninterrupted(
        tmp_path,
        tokenizer,
        steps=6,
        terms=DistillationConfig({"logits": 1.0, "task": 0.5, "hidden": 1.0}),
        teacher=teacher,
        data=encoded(tmp_path, tokenizer),
        collator=LISTWISE_RERANKING.collator(tokenizer),
        per_device_train_batch_size=2,
    )


def test_a_list_is_ranked_as_its_pairs_are_and_the_folder_is_a_rerankers(
    tmp_path, tokenizer, teacher
):
    lists = encoded(tmp_path, tokenizer)
    parts = batches(lists, tokenizer, 2, LISTWISE_RERANKING.collator(tokenizer))
    found = evaluate(teacher, parts, progress=False)
    save(teacher, tokenizer, tmp_path / "out")
    assert kind_of_folder(str(tmp_path / "out")) is RERANKING
    again = load_model(str(tmp_path / "out"), RERANKING).eval()
    assert kind_of(again).name == "reranking"
    pairs = RERANKING.encode(held_out(tmp_path), tokenizer, 20)
    wanted = evaluate(again, batches(pairs, tokenizer, 7), progress=False)
    assert list(found) == ["ndcg_at_10", "mrr_at_10", "spearmanr", "pearson"]
    assert found == pytest.approx(wanted, rel=1e-4)
