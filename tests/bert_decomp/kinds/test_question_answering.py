"""Answers in a text: files, windows, spans, SQuAD's scores, and a student of the same answers."""

import itertools
import json

import numpy as np
import pytest
import torch
from cases import assert_resumed_is_uninterrupted, write
from datasets import Dataset
from kinds.shared import run_commands, uncut
from tiny_models import ANIMALS, COLOURS, FAMILY_SIZES
from transformers import AutoConfig, AutoModelForQuestionAnswering

from bert_decomp import fuse_
from bert_decomp.data.batches import batches
from bert_decomp.data.files import ReadOptions
from bert_decomp.data.question_windows import encode_questions
from bert_decomp.data.questions import load_questions, read_questions
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.exporting.export import difference
from bert_decomp.kinds import QUESTION_ANSWERING, kind_of
from bert_decomp.kinds.spans import MOST_TOKENS, best_spans, chosen_windows, squad_scores
from bert_decomp.models.folders import trained_kind
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save


def asked(unanswerable=True):
    """(id, question, context, answers): which colour an animal has; owls are in no context."""
    rows = []
    for number, (colour, animal) in enumerate(itertools.product(COLOURS, ANIMALS)):
        context = f"a {COLOURS[number % 3]} hen sees the {colour} {animal} , the cow is grey"
        text = f"{colour} {animal}"
        answers = [] if unanswerable and animal == "owl" else [(text, context.index(text))]
        question = f"is the {animal} ?"
        rows.append((f"q{number}", question, context, answers))
    return rows


def squad(path, rows=None, **changes):
    """A file in SQuAD's form, two questions a paragraph where contexts agree."""
    paragraphs = []
    for name, question, context, answers in rows or asked():
        item = {"id": name, "question": question, "is_impossible": not answers}
        item["answers"] = [{"text": text, "answer_start": start} for text, start in answers]
        item |= {key: value for key, value in changes.items() if value is not None}
        item = {key: value for key, value in item.items() if changes.get(key, 0) is not None}
        paragraphs.append({"context": context, "qas": [item]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    return str(path)


def data_of(rows=None):
    rows = rows or asked()
    return Dataset.from_dict(
        {
            "question": [row[1] for row in rows],
            "context": [row[2] for row in rows],
            "answers": [[{"text": t, "start": s} for t, s in row[3]] for row in rows],
        }
    )


def reader(family="bert"):
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**FAMILY_SIZES[family], "num_labels": 2})
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def as_batches(tokenizer, longest=20, size=7, rows=None):
    data = encode_questions(data_of(rows), tokenizer, longest)
    return batches(data, tokenizer, size, QUESTION_ANSWERING.collator(tokenizer))


def test_every_file_gives_the_same_questions(tmp_path):
    hub = [
        (name, question, context, {"text": [t for t, _ in a], "answer_start": [s for _, s in a]})
        for name, question, context, a in asked()
    ]
    names = ("id", "question", "context", "answers")
    Dataset.from_list([dict(zip(names, row, strict=True)) for row in hub]).to_parquet(
        str(tmp_path / "c.parquet")
    )
    found = [
        read_questions(path)[0].to_dict()
        for path in (
            squad(tmp_path / "a.json"),
            write(tmp_path / "b.jsonl", hub, names),
            str(tmp_path / "c.parquet"),
        )
    ]
    assert found[0] == data_of().to_dict() and all(part == found[0] for part in found)
    whole = load_questions(squad(tmp_path / "a.json"), None, None, "label", "x")
    assert (len(whole.train), len(whole.validation)) == (18, 2)
    assert not set(whole.train["context"]) & set(whole.validation["context"])
    plain = load_questions(
        squad(tmp_path / "d.json", answers=None, is_impossible=None),
        squad(tmp_path / "a.json"), None, "label", "x",
    )  # fmt: skip
    assert not plain.is_labelled and "answers" not in plain.train.column_names


def test_what_does_not_fit_is_refused_or_counted_and_named(tmp_path):
    rows = asked()
    misplaced = [*rows[:3], ("odd", "is it ?", "the cat", [("cat", 3)]), *rows[3:]]
    data, reading = read_questions(squad(tmp_path / "a.json", misplaced))
    assert len(data) == 20 and reading.rows == 21
    assert reading.left_out == {"whose answer does not stand at answer_start": 1}
    assert reading.notes == ("answers that do not stand at answer_start: question 'odd'",)
    cases = (
        (squad(tmp_path / "b.json", [*rows, rows[0]]), "two questions with the id 'q0'"),
        (squad(tmp_path / "c.json", answers=[], is_impossible=False), "no answers but is not"),
        (squad(tmp_path / "d.json", is_impossible=True), "has answers but is marked"),
        (squad(tmp_path / "e.json", answers=[{"text": "cow", "answer_start": 0}],
               is_impossible=False), "20 of 20 answers do not stand"),
        (squad(tmp_path / "f.json", answers=[{"text": "cow"}]), "needs a text and the number"),
        (squad(tmp_path / "g.json", question=" "), "question is empty"),
        (squad(tmp_path / "h.json", question=None), "has no 'question'"),
        (write(tmp_path / "i.jsonl", [("a", "b")], ("question", "label")), "one of contexts"),
    )  # fmt: skip
    for path, word in cases:
        with pytest.raises(UserError, match=word) as caught:
            read_questions(path)
        assert "\n" not in str(caught.value)
    half = json.loads((tmp_path / "a.json").read_text())
    del half["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    (tmp_path / "j.json").write_text(json.dumps(half))
    with pytest.raises(UserError, match=r"question data\[0\]"):
        read_questions(str(tmp_path / "j.json"))
    with pytest.raises(UserError, match="has no answers; give"):
        path = squad(tmp_path / "k.json", answers=None, is_impossible=None)
        QUESTION_ANSWERING.read_held_out(path, ReadOptions())


@pytest.mark.parametrize("longest", [10, 13, 20, 40])
def test_windows_hold_every_word_and_point_at_the_answer(tokenizer, longest):
    rows = [*asked(), ("long", " ".join(["is"] * 50), "the cow sees a red cat", [("red cat", 15)])]
    data, hit = encode_questions(data_of(rows), tokenizer, longest), set()
    seen = {number: set() for number in range(len(rows))}
    for row in data:
        assert len(row["input_ids"]) <= longest
        context, text = rows[row["question"]][2], row["text"]
        for token, first, last in zip(row["input_ids"], row["first"], row["last"], strict=True):
            if first < 0:
                continue
            word = tokenizer.convert_ids_to_tokens(token)
            assert word in ("[UNK]", text[first:last])
            place = context.index(text) + first
            seen[row["question"]].add((place, context[place : place + last - first]))
        start, end = row["start_positions"], row["end_positions"]
        if start:
            assert text[row["first"][start] : row["last"][end]] == row["accepted"]
            hit.add(row["question"])
    for number, (_, _, context, _) in enumerate(rows):
        words = context.split()
        places = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
        assert seen[number] == set(zip(places, words, strict=False))
    assert hit == {number for number, row in enumerate(rows) if row[3]}
    with pytest.raises(UserError, match="no room"):
        encode_questions(data_of(), tokenizer, 5)


def test_spans_are_the_best_of_all_and_windows_of_a_question_compete():
    draw = np.random.default_rng(0)
    logits, inside = draw.normal(size=(6, 2, 40)), np.arange(40) >= draw.integers(1, 9, (6, 1))
    inside[5] = False
    spans = best_spans(logits, inside)
    for row in range(5):
        allowed = [
            (logits[row, 0, i] + logits[row, 1, j], i, j)
            for i in range(40)
            for j in range(i, min(i + MOST_TOKENS, 40))
            if inside[row, i] and inside[row, j]
        ]
        assert max(allowed) == (spans.score[row], spans.first[row], spans.last[row])
    assert spans.score[5] == -np.inf
    # Among the tokens of the context and the first, which stands for no answer.
    some = np.exp(np.where(inside[0] | (np.arange(40) == 0), logits[0], -np.inf))
    some /= some.sum(-1, keepdims=True)
    both = some[0, spans.first[0]] * some[1, spans.last[0]]
    assert np.exp(spans.score[0] - spans.scale[0]) == pytest.approx(both)
    question = np.array([1, 0, 1, 0, 2, 3])
    chosen = chosen_windows(spans, question, False)
    assert [entry[0] for entry in chosen] == [0, 1, 2, 3]
    for number, window, answered in chosen[:3]:
        assert answered and spans.score[window] == spans.score[question == number].max()
    assert not chosen[3][2]
    logits[4, :, 0] = 9.0
    found = chosen_windows(best_spans(logits, inside), question, True)
    assert found[2] == (2, 4, False) and found[0][2]


def test_scores_are_squads():
    assert squad_scores("the Eiffel-Tower!", ["eiffeltower"]) == (1, 1)
    assert squad_scores("in the red house", ["a red house", "blue"]) == (0, pytest.approx(0.8))
    assert squad_scores("red red", ["red"])[1] == pytest.approx(2 / 3)
    assert squad_scores("", [""]) == squad_scores("", ["the"]) == (1, 1)
    assert squad_scores("a word", [""]) == squad_scores("", ["word"]) == (0, 0)


@pytest.mark.parametrize("longest", [12, 40])
def test_right_spans_score_one_and_wrong_ones_as_counted(tokenizer, longest):
    found = []
    for rows in (asked(), asked(False)):
        parts = as_batches(tokenizer, longest, rows=rows)
        kind = QUESTION_ANSWERING
        truth = [kind.truth(batch) for batch in parts]
        joined = {name: kind.joined([part[name] for part in truth]).numpy() for name in truth[0]}
        answers = []
        for batch in parts:
            logits = torch.zeros(len(batch["input_ids"]), 2, batch["input_ids"].shape[1])
            for place, name in enumerate(("start_positions", "end_positions")):
                # A window without the answer is less sure.
                sure = torch.where(batch["start_positions"] > 0, 9.0, 1.0)
                logits[torch.arange(len(logits)), place, batch[name]] = sure
            answers.append(logits)
        found.append(kind.metrics(kind.joined(answers).numpy(), joined))
    perfect = dict.fromkeys(("f1", "exact_match", "f1_answerable", "accuracy_unanswerable"), 1.0)
    assert found[0] == perfect and found[1] == {"f1": 1.0, "exact_match": 1.0}
    nothing = QUESTION_ANSWERING.metrics(np.zeros_like(kind.joined(answers).numpy()), joined)
    assert nothing["exact_match"] < 0.2 and list(nothing) == ["f1", "exact_match"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_nothing_cut_fused_saved_and_loaded_are_the_teacher(tmp_path, tokenizer, family):
    teacher, found = reader(family), as_batches(tokenizer)
    student = uncut(teacher)
    kind = kind_of(student)
    assert kind is QUESTION_ANSWERING
    before, _ = kind.predict(teacher, found, progress=False)
    with pytest.raises(UserError, match="3 outputs a token"):
        kind.loaded("folder", AutoConfig.for_model(family, num_labels=3))
    close = {"rtol": 1e-3, "atol": 1e-3}
    again, _ = kind.predict(student, found, progress=False)
    torch.testing.assert_close(again, before, **close)
    save(student, tokenizer, tmp_path / "student")
    assert trained_kind(str(tmp_path / "student")) is kind
    loaded = load_model(str(tmp_path / "student")).eval()
    assert torch.equal(kind.predict(loaded, found, progress=False)[0], again)
    fused = fuse_(loaded)
    torch.testing.assert_close(kind.predict(fused, found, progress=False)[0], before, **close)
    together = evaluate(teacher, found, progress=False)
    assert together == evaluate(teacher, as_batches(tokenizer, size=1), progress=False)


def test_the_student_is_compared_and_sampled_over_real_tokens_alone():
    torch.manual_seed(3)
    lengths = (7, 4, 5)
    outputs = type("Outputs", (), {n: torch.randn(3, 7) for n in QUESTION_ANSWERING.outputs})
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    answers = QUESTION_ANSWERING.answers(outputs, {"attention_mask": mask})
    student = QUESTION_ANSWERING.answers(
        type("Outputs", (), {n: torch.randn(3, 7) for n in QUESTION_ANSWERING.outputs}),
        {"attention_mask": mask},
    )
    expected = 0.0
    for row, length in enumerate(lengths):
        a, b = (x[row, :, :length].double().div(2).log_softmax(-1) for x in (answers, student))
        expected += float((a.exp() * (a - b)).sum()) / 3 * 4
    found = QUESTION_ANSWERING.compare(student, answers, 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-5) and expected > 0
    drawn = QUESTION_ANSWERING.sampled_loss(answers, 1.0, torch.Generator().manual_seed(0))
    logs = [answers[row, :, :length].log_softmax(-1) for row, length in enumerate(lengths)]
    assert (
        -sum(x.max(-1).values.sum() for x in logs)
        <= drawn
        <= -sum(x.min(-1).values.sum() for x in logs)
    )


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tokenizer):
    assert_resumed_is_uninterrupted(
        tmp_path,
        tokenizer,
        terms=PRESETS["best"],
        teacher=reader(),
        data=encode_questions(data_of(), tokenizer, 20),
        collator=QUESTION_ANSWERING.collator(tokenizer),
    )


def test_an_export_is_compared_at_real_tokens_alone(tokenizer):
    model, parts = reader(), as_batches(tokenizer)
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in parts]

    def run(batch, at):
        found = QUESTION_ANSWERING.raw(model(**batch))
        found[batch["attention_mask"] == at] = torch.nan
        return found

    assert difference(lambda batch: run(batch, 0), model, inputs) == (0, 1)
    assert not np.isfinite(difference(lambda batch: run(batch, 1), model, inputs)[0])


@pytest.mark.slow
def test_the_guides_commands(tmp_path, tokenizer, monkeypatch, encoder_folder):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    save(reader(), tokenizer, tmp_path / "path" / "to" / "reader")
    encoder_folder.rename(tmp_path / "path/to/encoder")
    for name in ("train", "dev"):
        squad(tmp_path / f"{name}.json")
    run_commands("questions.md")
    assert trained_kind(str(tmp_path / "runs/new/model")) is QUESTION_ANSWERING
    results = json.loads((tmp_path / "runs/answers/results.json").read_text())
    assert list(results["metrics"]["teacher"])[:2] == ["f1", "exact_match"]
    data = results["task"]["schema"]["splits"][0]
    assert data["kind"] == "answers" and data["classes"] == {"with an answer": 16, "without one": 4}
    config = json.loads((tmp_path / "runs/answers/model/config.json").read_text())
    assert config["has_unanswerable"] is True
    session = onnxruntime.InferenceSession(str(tmp_path / "runs/answers/model/optimum/model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["start_logits", "end_logits"]
