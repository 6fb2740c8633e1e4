"""A user's own head and metric, registered as the guide says."""

import importlib
import json
import re
import shlex

import pytest
from cases import write
from huggingface_hub import ModelCard
from kinds.shared import GUIDES, QUICK
from tiny_models import ANIMALS, COLOURS

from bert_decomp.cli.command import command
from bert_decomp.cli.main import main
from bert_decomp.errors import UserError
from bert_decomp.kinds import KINDS, SINGLE_LABEL, register_kind


def test_a_name_is_given_once():
    with pytest.raises(UserError, match="single_label_classification' already"):
        register_kind(SINGLE_LABEL)


@pytest.mark.slow
def test_the_guides_file_and_commands(tmp_path, encoder_folder, monkeypatch, capsys):
    page = (GUIDES / "own-kind.md").read_text(encoding="utf-8")
    (tmp_path / "stars.py").write_text(
        re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    )
    (tmp_path / "path/to").mkdir(parents=True)
    encoder_folder.rename(tmp_path / "path/to/encoder")
    texts = [f"the {colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    for name in ("train", "dev"):
        rows = [(text, number % 5) for number, text in enumerate(texts)]
        write(tmp_path / f"{name}.csv", rows, ("text", "label"))
    write(tmp_path / "texts.csv", [(text,) for text in texts], ("text",))
    block = re.search(r"^```\n(python stars\.py.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    lines = [shlex.split(line)[2:] for line in block.replace("\\\n", " ").splitlines()]
    assert [line[0] for line in lines] == ["compress", "evaluate", "predict"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("stars")
    try:
        for line in lines:
            quick = QUICK.split() if line[0] == "compress" else []
            assert command(main, [*line, *quick]) == 0, line
    finally:
        del KINDS["stars"]
    results = json.loads((tmp_path / "runs/stars/results.json").read_text())
    for metrics in results["metrics"].values():
        assert next(iter(metrics)) == "within_one"
    assert re.search(r"^within_one \d", capsys.readouterr().out, re.MULTILINE)
    card = ModelCard.load(tmp_path / "runs/stars/model/README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.base_model is None
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {
        name: round(value, 4) for name, value in results["metrics"]["distilled"].items()
    }
    assert str(tmp_path) not in card.content and "# encoder at 2" in card.text
    config = json.loads((tmp_path / "runs/stars/model/config.json").read_text())
    assert config["architectures"] == ["BertForStars"]
    answers = (tmp_path / "runs/stars/answers.jsonl").read_text().splitlines()
    assert len(answers) == len(texts) and len(json.loads(answers[0])["scores"]) == 5
