"""Vectors of texts: sentence-transformers' folders in and out, the student's vectors beside the teacher's."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import assert_resumed_is_uninterrupted, write
from kinds.shared import run_commands, uncut
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from tiny_models import ANIMALS, COLOURS, tiny_batch, tiny_model

from bert_decomp import DecompositionConfig, decompose_, fuse_
from bert_decomp.data.batches import batches
from bert_decomp.data.texts import load_texts
from bert_decomp.distillation.losses import DistillationConfig
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import EMBEDDING, kind_of
from bert_decomp.kinds.embedding import Embedding
from bert_decomp.kinds.pooling import Pooling
from bert_decomp.models.folders import kind_of_folder
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save

TEXTS = [f"the {a} {b} sees a cow" for a in COLOURS for b in ANIMALS]


def files(*kinds, prompts=None, mode="mean"):
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    return {
        "modules.json": json.dumps(modules),
        "config_sentence_transformers.json": json.dumps(prompts or {}),
        "sentence_bert_config.json": json.dumps({"max_seq_length": 30, "do_lower_case": False}),
        "1_Pooling/config.json": json.dumps(
            {"word_embedding_dimension": 36, f"pooling_mode_{mode}": True}
        ),
    }


def embedder(folder, tokenizer, family="bert", **changes):
    """A folder as sentence-transformers writes it."""
    model = tiny_model(family).base_model
    model.task_kind = Embedding(
        Pooling(), files("Transformer", "Pooling", "Normalize", mode="mean_tokens", **changes)
    )
    save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def teacher(tmp_path, tokenizer):
    return embedder(tmp_path / "teacher", tokenizer)


def vectors_of(model, tokenizer, texts=TEXTS):
    kind = kind_of(model)
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        return kind.answers(model(**batch), batch)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_vectors_are_sentence_transformers_own_in_every_form(tmp_path, tokenizer, family):
    prompts = {
        "prompts": {"query": "a red"},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    }
    folder = embedder(tmp_path / "teacher", tokenizer, family, prompts=prompts)
    teacher = load_model(folder, EMBEDDING).eval()
    prompted = ["a red" + text for text in TEXTS]
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(
        vectors_of(teacher, tokenizer, prompted), expected, rtol=1e-4, atol=1e-5
    )
    student = copy.deepcopy(teacher)
    decompose_(student, DecompositionConfig("svd", rank=7), progress=False)
    save(student, tokenizer, tmp_path / "student")
    again = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert again.prompts["query"] == "a red" and again.default_prompt_name == "query"
    assert again.similarity_fn_name == "dot" and again.max_seq_length == 30
    expected = vectors_of(student, tokenizer, prompted)
    torch.testing.assert_close(
        again.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(
        vectors_of(load_model(str(tmp_path / "student"), EMBEDDING).eval(), tokenizer, prompted),
        expected,
    )
    fuse_(student)
    torch.testing.assert_close(
        vectors_of(student, tokenizer, prompted), expected, rtol=1e-3, atol=1e-4
    )
    fuse_(again[0].auto_model)
    torch.testing.assert_close(
        again.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-3, atol=1e-4
    )


def held_out(teacher, tokenizer, rows=None):
    data = kind_of(teacher).encode(rows, tokenizer, 30)
    reference = kind_of(teacher).with_reference(data, teacher, batches(data, tokenizer, 4))
    return batches(reference, tokenizer, 7)


def test_nothing_cut_finds_all_that_the_teacher_finds(tmp_path, tokenizer, teacher):
    path = write(tmp_path / "t.jsonl", [(text,) for text in TEXTS], ("text",))
    task, model = (
        load_texts(path, path, None, "label", "embedding"),
        load_model(teacher, EMBEDDING).eval(),
    )
    found = held_out(model, tokenizer, task.validation)
    exact = evaluate(model, found, progress=False)
    assert list(exact) == ["cosine", "recall_at_10", "recall_at_10_own_index"]
    assert exact == pytest.approx(dict.fromkeys(exact, 1.0))
    assert evaluate(uncut(model), found, progress=False)["cosine"] == pytest.approx(1, abs=1e-5)
    cut = copy.deepcopy(model)
    config = DecompositionConfig(encoder_fraction=0.2, min_rank=1)
    decompose_(cut, config, found, progress=False)
    worse = evaluate(cut, found, progress=False)
    assert worse["cosine"] < 0.999 and all(0 <= value <= 1 for value in worse.values())


def test_recall_and_spearman_are_those_counted_by_hand():
    draw = np.random.default_rng(0)
    teacher = draw.normal(size=(30, 5))
    student = teacher + 0.5 * draw.normal(size=(30, 5))
    pair, score = np.repeat(np.arange(15), 2), np.repeat(draw.random(15), 2)
    order = draw.permutation(30)
    truth = {"labels": teacher, "pair": pair, "score": score}
    shuffled = {name: value[order] for name, value in truth.items()}
    found = EMBEDDING.metrics(student[order], shuffled)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    t, s = unit(teacher), unit(student)

    def nearest(queries, documents):
        return [
            set(
                sorted(
                    (j for j in range(30) if j != i), key=lambda j: -(queries[i] @ documents[j])
                )[:10]
            )
            for i in range(30)
        ]

    def recall(documents):
        return np.mean(
            [len(a & b) / 10 for a, b in zip(nearest(t, t), nearest(s, documents), strict=True)]
        )

    assert found == {
        "cosine": pytest.approx((s * t).sum(1).mean()),
        "recall_at_10": pytest.approx(recall(t)),
        "recall_at_10_own_index": pytest.approx(recall(s)),
        "spearmanr": pytest.approx(spearmanr((s[::2] * s[1::2]).sum(1), score[::2]).statistic),
    }
    with pytest.raises(UserError, match="give the teacher"):
        EMBEDDING.metrics(student, {})


@pytest.mark.slow
def test_gradients_are_those_of_the_squared_distance():
    """The mean outer gradient of the sampled loss is J^T J, J the derivative of the unit vector."""
    kind, point = Embedding(Pooling(normalise=True)), torch.randn(1, 1, 4, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.long)
    jacobian = torch.autograd.functional.jacobian(lambda x: kind.pooling(x, mask)[0], point)[
        :, 0, 0
    ]
    total = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(3000):
        x = point.clone().requires_grad_()
        drawing = torch.Generator().manual_seed(seed)
        (gradient,) = torch.autograd.grad(kind.sampled_loss(kind.pooling(x, mask), 2.0, drawing), x)
        total += gradient[0].T @ gradient[0] / 3000
    torch.testing.assert_close(
        total, jacobian.T @ jacobian, rtol=0.1, atol=0.05 * float(total.diag().max())
    )
    same = torch.randn(3, 4)
    assert abs(float(kind.compare(same, same, 2.0))) < 1e-6 < float(kind.compare(-same, same, 2.0))


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tokenizer, teacher):
    path = write(tmp_path / "t.jsonl", [(text,) for text in TEXTS], ("text",))
    model = load_model(teacher, EMBEDDING)
    data = kind_of(model).encode(
        load_texts(path, path, None, "label", "embedding").train, tokenizer, 30
    )
    terms = DistillationConfig({"hidden": 1, "logits": 1})
    trainer = assert_resumed_is_uninterrupted(
        tmp_path, tokenizer, terms=terms, teacher=model, data=data
    )
    assert all(entry["loss_logits"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_folders_with_other_modules_are_refused(tmp_path, tokenizer):
    model = tiny_model("bert").base_model
    model.task_kind = Embedding(Pooling(), files("Transformer", "Pooling", "Dense"))
    save(model, tokenizer, tmp_path / "dense")
    with pytest.raises(UserError, match="only Transformer, Pooling and Normalize"):
        load_model(str(tmp_path / "dense"), EMBEDDING)


def test_a_plain_encoder_becomes_a_folder_of_sentence_transformers(
    tmp_path, tokenizer, encoder_folder
):
    assert kind_of_folder(str(encoder_folder)) is None
    model = load_model(str(encoder_folder), EMBEDDING).eval()
    save(model, tokenizer, tmp_path / "out")
    assert kind_of_folder(str(tmp_path / "out")) is EMBEDDING
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(
        loaded.encode(TEXTS, convert_to_tensor=True),
        vectors_of(model, tokenizer),
        rtol=1e-4,
        atol=1e-5,
    )
    assert kind_of(tiny_model("bert").base_model).pooling.modes == ("mean",) and tiny_batch(2)


def test_an_embedder_of_several_sizes(teacher, tokenizer, tmp_path):
    """sentence-transformers loads each, and writes it to a folder of its own."""
    model = load_model(teacher, EMBEDDING)
    config = DecompositionConfig("svd", nested_fractions=[0.5, 0.3])
    decompose_(model, config, progress=False)
    save(model, tokenizer, tmp_path / "nested")
    seen = []
    for fraction in (0.5, 0.3):
        small = load_model(str(tmp_path / "nested"), EMBEDDING, encoder_fraction=fraction).eval()
        expected = vectors_of(small, tokenizer)
        loaded = SentenceTransformer(
            str(tmp_path / "nested"), device="cpu", config_kwargs={"encoder_fraction": fraction}
        )
        loaded.save_pretrained(str(tmp_path / "one"))
        for one in (loaded, SentenceTransformer(str(tmp_path / "one"), device="cpu")):
            found = one.encode(TEXTS, convert_to_tensor=True)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seen.append(expected)
    assert not torch.allclose(*seen, atol=1e-3)


@pytest.mark.slow
def test_the_guides_commands(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    embedder(tmp_path / "path" / "to" / "embedder", tokenizer)
    for name, texts in (("train", TEXTS), ("dev", TEXTS[3:])):
        write(tmp_path / f"{name}.jsonl", [(text,) for text in texts], ("text",))
    pairs = [(a, b, 0.1 * i) for i, (a, b) in enumerate(pairwise(TEXTS))]
    write(tmp_path / "pairs.csv", pairs, ("sentence1", "sentence2", "score"))
    run_commands("embeddings.md")
    results = json.loads((tmp_path / "runs/vectors/results.json").read_text())
    assert results["metrics"]["teacher"]["recall_at_10"] == pytest.approx(1)
    printed = capsys.readouterr().out
    assert (
        f"cosine {results['metrics']['distilled']['cosine']:.3f}" in printed
        and "spearmanr" in printed
    )
    model = SentenceTransformer("runs/vectors/model", device="cpu")
    assert model.encode(TEXTS).shape == (20, 36)
