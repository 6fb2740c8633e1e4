"""A tag for every token: files, windows, spans, and a student of the same answers."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import assert_resumed_is_uninterrupted, write
from datasets import ClassLabel, Dataset, Features, List, Value
from kinds.shared import run_commands, uncut
from tiny_models import ANIMALS, COLOURS, FAMILY_SIZES
from transformers import AutoConfig, AutoModelForTokenClassification

from bert_decomp import DecompositionConfig, decompose_, fuse_
from bert_decomp.data.batches import batches
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.token_windows import IGNORED, MOST_TOKENS, encode_sentences
from bert_decomp.data.tokens import load_sentences, load_tagged
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import TOKEN_CLASSIFICATION, kind_of
from bert_decomp.kinds.token_classification import TokenClassification
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save

NAMES = ("O", "B-A", "I-A")
CONFIG = {
    "num_labels": 3,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}
MODEL = ModelLabels.named(*NAMES)


def tagged():
    """Sentences in which a colour and an animal after it are one name."""
    rows = []
    for colour in COLOURS:
        for animal in ANIMALS:
            rows.append(
                (["the", colour, animal, "sees", "a", "cow"], ["O", "B-A", "I-A", "O", "O", "B-A"])
            )
    return rows


def tagger(family="bert", **changes):
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**FAMILY_SIZES[family], **CONFIG, **changes})
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def conll(path, rows, between="\n"):
    path.write_text(
        between.join("".join(f"{t} X {g}\n" for t, g in zip(*row, strict=True)) for row in rows)
    )
    return str(path)


def held_out(tokenizer, longest=20, rows=None):
    rows = rows or tagged()
    data = Dataset.from_dict(
        {"tokens": [r[0] for r in rows], "label": [[NAMES.index(t) for t in r[1]] for r in rows]}
    )
    return encode_sentences(data, tokenizer, longest)


def as_batches(data, tokenizer, size=7):
    return batches(data, tokenizer, size, TOKEN_CLASSIFICATION.collator(tokenizer))


def test_every_file_gives_the_same_sentences(tmp_path):
    numbered = [{"tokens": t, "ner_tags": [NAMES.index(g) for g in tags]} for t, tags in tagged()]
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(NAMES)))}
    )
    Dataset.from_list(numbered, features=features).to_parquet(str(tmp_path / "c.parquet"))
    with_documents = conll(tmp_path / "d.conll", tagged(), "\n\n-DOCSTART- -X- O\n\n")
    found = [
        load_tagged(path, MODEL)[0].to_dict()
        for path in (
            conll(tmp_path / "a.conll", tagged()),
            write(tmp_path / "b.jsonl", tagged(), ("tokens", "tags")),
            str(tmp_path / "c.parquet"),
            with_documents,
        )
    ]
    assert all(part == found[0] for part in found) and len(found[0]["tokens"]) == 20
    assert found[0]["label"][0] == [0, 1, 2, 0, 0, 1]
    assert "-DOCSTART-: 19" in load_tagged(with_documents, MODEL)[1].notes[0]
    task = load_sentences(with_documents, None, None, "label", None, "token_classification")
    assert task.label_names == NAMES and (len(task.train), len(task.validation)) == (18, 2)
    assert (
        load_sentences(str(tmp_path / "c.parquet"), None, None, "label", None, "x").label_names
        == NAMES
    )


@pytest.mark.parametrize(
    "text,word",
    [
        ("a O\nb\n", "line 2: not the 2 columns"),
        ("a\nb\n", "one column"),
        ("a X\n", "the model lacks: X"),
        ("\n", "no examples"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, word):
    (tmp_path / "t.conll").write_text(text)
    with pytest.raises(UserError, match=word):
        load_tagged(str(tmp_path / "t.conll"), MODEL)


def test_lists_of_other_lengths_are_refused(tmp_path):
    wrong = (
        ((["a", "b"], ["O"]), "as many tags"),
        (([], []), "at least one token"),
        (("a", "O"), "not there"),
    )
    for row, word in wrong:
        path = write(tmp_path / "t.jsonl", [row, (["a"], ["O"])], ("tokens", "tags"))
        with pytest.raises(UserError, match=word):
            load_tagged(path, MODEL)


@pytest.mark.parametrize("longest", [5, 6, 9, 40])
def test_every_word_is_labelled_once_wherever_windows_end(tokenizer, longest):
    words = [*COLOURS, *ANIMALS, "the", "a"] * 2
    tags = [NAMES[i % 3] for i in range(len(words))]
    data = held_out(tokenizer, longest, [(words, tags), (words[:3], tags[:3])])
    seen = {}
    for row in data:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["word"]) <= longest
        for token, label, word in zip(row["input_ids"], row["labels"], row["word"], strict=True):
            assert (label == IGNORED) == (word == -1)
            if word >= 0:
                assert word not in seen
                seen[word] = (tokenizer.convert_ids_to_tokens(token), NAMES[label])
    pairs = list(zip(words, tags, strict=True))
    counts = ((0, 22), (1, 3))
    expected = {s * MOST_TOKENS + i: pairs[i] for s, count in counts for i in range(count)}
    assert seen == expected


def test_spans_over_windows_are_counted_as_in_the_whole_sentence(tokenizer):
    from seqeval.metrics import f1_score

    words, tags = ["the", "red", "cat"] * 6, ["O", "B-A", "I-A"] * 6
    found = []
    for longest in (6, 40):
        data = held_out(tokenizer, longest, [(words, tags)])
        (batch,) = as_batches(data, tokenizer, 99)
        kind = TokenClassification(NAMES)
        truth = {name: value.numpy() for name, value in kind.truth(batch).items()}
        # The answers follow from the words alone: every third name lacks its second token.
        given = np.where(truth["word"] % 9 == 5, 0, truth["labels"])
        found.append(kind.metrics(np.eye(3)[np.maximum(given, 0)], truth))
    answers = [tag if i % 9 != 5 else "O" for i, tag in enumerate(tags)]
    assert found[0] == found[1] and found[0]["f1"] == pytest.approx(f1_score([tags], [answers]))
    assert list(found[0]) == ["f1", "precision", "recall", "token_accuracy"]
    plain = TokenClassification(("X", "Y", "Z")).metrics(
        np.eye(3), {"labels": np.arange(3), "word": np.arange(3)}
    )
    assert plain == {"token_accuracy": 1.0, "f1_macro": 1.0}


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_nothing_cut_fused_saved_and_loaded_are_the_teacher(tmp_path, tokenizer, family):
    teacher, found = tagger(family), as_batches(held_out(tokenizer), tokenizer)
    student = uncut(teacher)
    kind = kind_of(student)
    assert kind == TokenClassification(NAMES)
    before, _ = kind.predict(teacher, found, progress=False)
    torch.testing.assert_close(
        kind.predict(student, found, progress=False)[0], before, rtol=1e-3, atol=1e-3
    )
    save(student, tokenizer, tmp_path / "student")
    loaded = load_model(str(tmp_path / "student")).eval()
    assert torch.equal(
        kind.predict(loaded, found, progress=False)[0],
        kind.predict(student, found, progress=False)[0],
    )
    torch.testing.assert_close(
        kind.predict(fuse_(loaded), found, progress=False)[0], before, rtol=1e-3, atol=1e-3
    )
    cut = copy.deepcopy(teacher)
    decompose_(cut, DecompositionConfig(encoder_fraction=0.3, min_rank=1), found, progress=False)
    assert set(evaluate(cut, found, progress=False)) == set(
        evaluate(teacher, found, progress=False)
    )


def test_padding_changes_no_answer_and_no_truth(tokenizer):
    model, data = tagger(), held_out(tokenizer, rows=[*tagged()[:3], (["a"], ["O"])])
    together = evaluate(model, as_batches(data, tokenizer, 9), progress=False)
    assert together == evaluate(model, as_batches(data, tokenizer, 1), progress=False)


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tokenizer):
    data, teacher = held_out(tokenizer), tagger()
    assert_resumed_is_uninterrupted(
        tmp_path,
        tokenizer,
        terms=PRESETS["best"],
        teacher=teacher,
        data=data,
        collator=TOKEN_CLASSIFICATION.collator(tokenizer),
    )
    wrong = data.map(lambda row: {"labels": [7] * len(row["labels"])})
    with pytest.raises(UserError, match="has the tag 7"):
        TOKEN_CLASSIFICATION.check_examples(teacher, wrong)


@pytest.mark.slow
def test_the_guides_commands(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tagger(), tokenizer, tmp_path / "path" / "to" / "tagger")
    for name in ("train", "dev"):
        conll(tmp_path / f"{name}.conll", tagged())
    run_commands("tokens.md")
    results = json.loads((tmp_path / "runs/tags/results.json").read_text())
    assert list(results["metrics"]["teacher"]) == ["f1", "precision", "recall", "token_accuracy"]
    data = results["task"]["schema"]["splits"][0]
    assert data["kind"] == "tags" and data["classes"] == {"O": 60, "B-A": 40, "I-A": 20}
