"""Entities and tags of files are those of transformers' pipeline and of the evaluation, in windows or not."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import write
from datasets import Dataset
from kinds.test_question_answering import reader
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
from bert_decomp.kinds.entities import entities
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
