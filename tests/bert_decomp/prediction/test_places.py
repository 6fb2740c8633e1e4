"""Entities, tags and answers of files are those of transformers' pipeline and of the evaluation, in windows or not."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import write
from datasets import Dataset
from kinds.test_question_answering import as_batches as question_batches
from kinds.test_question_answering import asked, reader, squad
from kinds.test_token_classification import CONFIG, conll, held_out, tagger
from kinds.test_token_classification import as_batches as sentence_batches
from seqeval.metrics.sequence_labeling import get_entities
from tiny_models import ANIMALS, COLOURS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from bert_decomp import DecompositionConfig, Predictor, decompose_, predict
from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main
from bert_decomp.data import windows
from bert_decomp.data.tokens import text_columns
from bert_decomp.data.windows import TextSource
from bert_decomp.errors import UserError
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.kinds import model_inputs
from bert_decomp.kinds.entities import entities
from bert_decomp.kinds.spans import squad_scores
from bert_decomp.models.saving import save
from bert_decomp.prediction import workers


def pieces_tokenizer(family):
    """A tokenizer of sub-words in the manner of a family."""
    marks = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    letters = [*"abcdeghlnorstuvwy", ".", ",", "-"]
    if family == "bert":
        vocabulary = [*marks, *letters, *(f"##{x}" for x in letters[:-3]), "see", "##s", "cat"]
        found = Tokenizer(
            models.WordPiece(
                {w: i for i, w in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"
            )
        )
        found.normalizer = normalizers.BertNormalizer()
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        space, split = "\u2581", pre_tokenizers.Metaspace()
        if family == "roberta":
            space, split = "\u0120", pre_tokenizers.ByteLevel(add_prefix_space=True)
        vocabulary = [*marks, space, *letters, *(space + x for x in letters)]
        found = Tokenizer(
            models.BPE(
                vocab={w: i for i, w in enumerate(vocabulary)},
                merges=[(space, x) for x in letters],
                unk_token="[UNK]",
            )
        )
        found.pre_tokenizer = split
    found.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": marks[0], "cls_token": marks[1], "sep_token": marks[2]}
    return PreTrainedTokenizerFast(
        tokenizer_object=found, unk_token=AddedToken(marks[3]), model_max_length=40, **names
    )


def texts(family):
    """Texts of sub-words; where the pipeline knows no words but what stands between spaces, nothing else."""
    plain = ["red cows see a cat", "the green owl", "a", "see the red cat"]
    odd = ["the owl, a cat-see.", "cat.cat. Red Owl \u00e9 cat", "The  green owl  "]
    return [*plain, *odd] if family == "bert" else plain


@pytest.mark.parametrize("strategy, family", [
    ("simple", "words"), ("first", "bert"), ("first", "roberta"), ("first", "xlm-roberta"),
])  # fmt: skip
def test_entities_are_those_of_the_pipeline(strategy, family, tmp_path):
    tokenizer = tiny_tokenizer() if family == "words" else pieces_tokenizer(family)
    given = [f"the {c} {a} sees a cow" for c in COLOURS for a in ANIMALS]
    given = given if family == "words" else texts(family)
    model = tagger("bert" if family == "words" else family)
    save(model, tokenizer, tmp_path / "model")
    recognise = pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy
    )
    rows = Predictor(str(tmp_path / "model")).columns(given)["entities"].to_pylist()
    count = 0
    for text, found in zip(given, rows, strict=True):
        wanted = recognise(text)
        assert [(e["label"], e["start"], e["end"]) for e in found] == [
            (e["entity_group"], e["start"] + text[e["start"] :].startswith(" "), e["end"])
            for e in wanted  # without a space that its tokenizer counts as the first word's
        ]
        assert all(e["text"] == text[e["start"] : e["end"]] for e in found)
        scores = [e["score"] for e in wanted]
        np.testing.assert_allclose([e["score"] for e in found], scores, atol=1e-5)
        count += len(found)
    assert count > len(given) / 2


def test_tags_are_put_together_as_seqeval_and_the_pipeline_do():
    draw = random.Random(0)
    grouped = pipeline(
        "token-classification", model=tagger(), tokenizer=tiny_tokenizer()
    ).group_entities
    for names in (["O", "B-A", "I-A", "B-C-D", "I-C-D"], ["O", "A", "C"], [
        "O", "B-A", "I-A", "E-A", "S-A", "B-C", "I-C", "E-C",
    ]):  # fmt: skip
        for _ in range(200):
            tags = draw.choices(names, k=draw.randrange(12))
            found = entities(tags, names)
            if len(names) != 3:
                assert found == get_entities(tags)
            if len(names) < 8:
                words = [
                    {"entity": t, "score": 1.0, "word": "a", "start": i, "end": i}
                    for i, t in enumerate(tags)
                ]
                assert found == [
                    (e["entity_group"], e["start"], e["end"])
                    for e in grouped(words)
                    if e["entity_group"] != "O"
                ]
    assert entities(["X", "X", "Y"], ["X", "Y"]) == [("X", 0, 0), ("X", 1, 1), ("Y", 2, 2)]


def sentences():
    """Words with tags, some longer than a window, and the texts that they are."""
    draw = random.Random(1)
    words = [draw.choices([*COLOURS, *ANIMALS, "the", "a"], k=1 + i * 5 % 47) for i in range(23)]
    return [(w, draw.choices(list(CONFIG["label2id"]), k=len(w))) for w in words]


@pytest.fixture(scope="module")
def ner(tmp_path_factory):
    model = tagger()
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    save(model, tiny_tokenizer(), tmp_path_factory.mktemp("ner") / "model")
    return model, str(tmp_path_factory.getbasetemp() / "ner0" / "model")


@pytest.mark.parametrize("longest", [7, 40])
def test_a_tag_a_word_is_what_the_evaluation_scores(ner, longest, tmp_path, tokenizer):
    model, folder = ner
    rows = sentences()
    path = conll(tmp_path / "in.conll", rows)
    predict(folder, path, tmp_path / "out.jsonl", max_seq_length=longest, batch_tokens=90)
    found = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["tags"]) for row in found] == [len(words) for words, _ in rows]
    pairs = [
        pair
        for row, (_, tags) in zip(found, rows, strict=True)
        for pair in zip(row["tags"], tags, strict=True)
    ]
    scored = evaluate(
        model, sentence_batches(held_out(tokenizer, longest, rows), tokenizer), progress=False
    )
    assert scored["token_accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    # A text that its tokenizer splits into the same words has the entities of these tags.
    predictor = Predictor(folder, max_seq_length=longest)
    of_texts = predictor.columns([" ".join(words) for words, _ in rows])["entities"].to_pylist()
    for (words, _), row, given in zip(rows, found, of_texts, strict=True):
        assert [(e["label"], e["text"]) for e in given] == [
            (label, " ".join(words[first : last + 1]))
            for label, first, last in get_entities(row["tags"])
        ]


@pytest.mark.slow
def test_every_file_in_float32_and_in_int8(ner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOW_ROWS", 6)
    _, folder = ner
    rows = sentences()
    words = [row[0] for row in rows]
    table = pa.table({"id": range(len(words)), "tokens": words, "text": map(" ".join, words)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    write(tmp_path / "in.jsonl", [(w,) for w in words], ("words",))
    conll(tmp_path / "in.conll", rows)
    (tmp_path / "bare.conll").write_text("\n\n".join("\n".join(row) for row in words))
    Dataset(table).save_to_disk(tmp_path / "in.dataset")
    found = []
    for number, name in enumerate(("parquet", "jsonl", "conll", "dataset")):
        output = tmp_path / f"{number}.parquet"
        predict(folder, str(tmp_path / f"in.{name}"), output, progress=False)
        found.append(pq.read_table(output))
    predict(folder, str(tmp_path / "bare.conll"), tmp_path / "bare.parquet")
    source = TextSource.open(str(tmp_path / "in.parquet"), ["tokens"], ["id"], text_columns)
    for window in source.checked().windows():
        again = workers._unpack(workers._pack(window))
        assert (again.number, again.texts) == (window.number, window.texts)
    assert found[0].column_names == ["tags", "scores"] and len(found[0]) == len(words)
    assert all(one.equals(found[0]) for one in [*found, pq.read_table(tmp_path / "bare.parquet")])
    line = [folder, str(tmp_path / "in.parquet"), "--output", str(tmp_path / "text.jsonl")]
    line += ["--text_column_names", "text", "--keep_columns", "id", "--int8"]
    for said in ("23 texts; ", "all from an earlier run"):
        assert command(main, line) == 0
        assert said in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert [row["id"] for row in lines] == list(range(23)) and set(lines[0]) == {"id", "entities"}
    (tmp_path / "text.jsonl").write_text("{}\n")
    assert command(main, line) == 2
    assert "exists and was not made of this input" in capsys.readouterr().err


def test_what_cannot_be_tagged_or_answered_is_one_line(ner, tmp_path, tokenizer, capsys):
    _, folder = ner
    save(reader(), tokenizer, tmp_path / "reader")
    cases = (
        (folder, write(tmp_path / "a.jsonl", [(["a", " "],)], ("tokens",)), [], "none may be empty"),
        (folder, write(tmp_path / "b.jsonl", [("a b", "c d")], ("question", "context")), [],
         "words of one text a row"),
        (folder, write(tmp_path / "c.jsonl", [(["a"],), ("b",)], ("tokens",)), [], "but not there"),
        (folder, write(tmp_path / "d.jsonl", [("a",)], ("text",)), ["--version_2_with_negative"],
         "--version_2_with_negative is for question answering"),
        (tmp_path / "reader", tmp_path / "d.jsonl", [], "a question and its context are needed"),
        (tmp_path / "reader", tmp_path / "b.jsonl", ["--max_seq_length", "5"], "leaves no room"),
        (folder, tmp_path / "d.jsonl", ["--output", str(tmp_path / "x.csv")], "ends in '.csv'"),
    )  # fmt: skip
    (tmp_path / "e.conll").write_text("a O\nb\n")
    for model, path, options, words in (*cases, (folder, tmp_path / "e.conll", [], "line 2: not")):
        line = [str(model), str(path), "--output", str(tmp_path / "x.jsonl"), *options]
        assert command(main, line) == 2, words
        said = capsys.readouterr().err
        errors = [x for x in said.replace("\r", "\n").splitlines() if "error: " in x]
        assert len(errors) == 1 and words in errors[0], errors
        assert not list(tmp_path.glob("x.jsonl"))
    with pytest.raises(UserError, match="columns"):
        Predictor(folder)(["a"])


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
