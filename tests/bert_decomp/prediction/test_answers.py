"""Answers to questions of files are those of the evaluation and of transformers 4's pipeline, in windows or not."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from cases import write
from kinds.test_question_answering import as_batches as question_batches
from kinds.test_question_answering import asked, reader, squad

from bert_decomp import Predictor
from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main
from bert_decomp.data import windows
from bert_decomp.data.windows import TextSource
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import model_inputs
from bert_decomp.kinds.spans import squad_scores
from bert_decomp.models.saving import save


def of_the_pipeline(model, tokenizer, question, context, may_be_absent):
    """The answer of transformers 4's question-answering pipeline (5 has none) to a question in one window, in float64.

    Softmax over the context and the first token, the best product of a first and a last token; no answer if the first
    token's is larger. Answers have 30 tokens at most, where the pipeline's default is 15.
    """
    encoded = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
    places = encoded.pop("offset_mapping")[0]
    with torch.no_grad():
        outputs = model.double()(**encoded)
    inside = np.array([part == 1 for part in encoded.sequence_ids(0)])
    kept = inside | (np.arange(len(inside)) == 0)
    start, end = (
        np.where(kept, np.exp(x[0].numpy() - x[0].numpy()[kept].max()), 0)
        for x in (outputs.start_logits, outputs.end_logits)
    )
    start, end = start / start.sum(), end / end.sum()
    product = np.triu(np.outer(np.where(inside, start, 0), np.where(inside, end, 0)))
    product = np.tril(product, 29)
    first, last = np.unravel_index(product.argmax(), product.shape)
    if may_be_absent and start[0] * end[0] > product.max():
        return None, None, start[0] * end[0]
    return int(places[first][0]), int(places[last][1]), product.max()


@pytest.mark.parametrize("may_be_absent", [False, True])
@pytest.mark.parametrize("longest", [13, 40])
def test_answers_are_the_evaluations_and_the_pipelines(
    longest, may_be_absent, tmp_path, tokenizer, monkeypatch
):
    model, rows = reader(), asked(may_be_absent)
    with torch.no_grad():
        # The first token's logits go up until some questions have no answer and some have one.
        batch = model_inputs(question_batches(tokenizer, 40, rows=rows)[0])
        hidden = model.bert(**batch).last_hidden_state
        model.qa_outputs.weight += 0.3 * (hidden[:, 0] - hidden[:, 1:].mean(1)).mean(0)
    save(model, tokenizer, tmp_path / "model")
    questions, contexts = [row[1] for row in rows], [row[2] for row in rows]
    names = ("title", "context", "question", "text")
    given = [("the title", c, q, "some text") for q, c in zip(questions, contexts, strict=True)]
    write(tmp_path / "in.jsonl", given, names)
    line = [str(tmp_path / "model"), str(tmp_path / "in.jsonl"), "--keep_columns", "title"]
    line += ["--output", str(tmp_path / "out.jsonl"), "--max_seq_length", str(longest)]
    assert command(main, [*line, *["--version_2_with_negative"] * may_be_absent]) == 0
    found = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(row) for row in found] == [{"title", "answer", "start", "end", "score"}] * len(rows)
    # SQuAD's form gives the same, also in parts.
    monkeypatch.setattr(windows, "WINDOW_BYTES", 200)
    squad(tmp_path / "in.json", rows)
    predictor = Predictor(line[0], max_seq_length=longest, version_2_with_negative=may_be_absent)
    source = TextSource.open(
        str(tmp_path / "in.json"), None, ["id"], predictor.windowed.text_columns
    )
    again = [
        {"title": "the title", **row}
        for window in source.windows()
        for row in pa.table(predictor.columns(*window.texts)).to_pylist()
    ]
    assert len(list(source.windows())) > 3 and len(again) == len(found)
    for one, other in zip(again, found, strict=True):
        assert one.pop("score") == pytest.approx(other["score"], rel=1e-4)
        assert one == {name: value for name, value in other.items() if name != "score"}
    names = [name for window in source.windows() for name in window.kept["id"].to_pylist()]
    assert names == [row[0] for row in rows]
    absent = [row["answer"] is None for row in found]
    assert not all(absent) and any(absent) == may_be_absent
    for row, context in zip(found, contexts, strict=True):
        if row["answer"] is not None:
            assert row["answer"] == context[row["start"] : row["end"]]
    # The evaluation of the same model on the same questions counts these answers.
    scored = evaluate(model, question_batches(tokenizer, longest, rows=rows), progress=False)
    wanted = [
        squad_scores(row["answer"] or "", [text for text, _ in answers])
        for row, (*_, answers) in zip(found, rows, strict=True)
    ]
    assert (scored["exact_match"], scored["f1"]) == pytest.approx(tuple(np.mean(wanted, 0)))
    if longest == 40:
        for row, question, context in zip(found, questions, contexts, strict=True):
            start, end, score = of_the_pipeline(model, tokenizer, question, context, may_be_absent)
            assert (row["start"], row["end"]) == (start, end)
            assert row["score"] == pytest.approx(score, rel=1e-4)


def test_the_config_says_whether_there_may_be_no_answer(tmp_path, tokenizer):
    model = reader()
    model.config.has_unanswerable = True
    with torch.no_grad():
        model.qa_outputs.weight.zero_()
        model.qa_outputs.bias.zero_()
    save(model, tokenizer, tmp_path / "model")
    predictor = Predictor(str(tmp_path / "model"))
    rows = pa.table(predictor.columns(["is it ?", "is it ?"], ["the cat", ""])).to_pylist()
    # All logits are alike: no answer is not above the best one. A context without a word has none.
    assert rows[0]["answer"] == "the" and rows[0]["score"] == pytest.approx(1 / 9)
    assert rows[1] == {"answer": None, "start": None, "end": None, "score": 1.0}
