"""The command ``export``: what it says and writes, and what it refuses in one line."""

import importlib.util

import pytest
import torch
from exporting.low_rank import low_rank
from optional import needs
from tiny_models import tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
)

from bert_decomp.cli.command import command
from bert_decomp.cli.export import main
from bert_decomp.errors import UserError
from bert_decomp.exporting.export import (
    SENTENCES,
    TOLERANCE,
    check_batches,
    difference,
    export,
)
from bert_decomp.exporting.formats import find_format
from bert_decomp.models.saving import save
from bert_decomp.runtime import fuse_

needs_onnx, needs_openvino = needs("export"), needs("openvino")


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, model",
    [
        pytest.param("onnx", low_rank, marks=needs_onnx),
        pytest.param("openvino", low_rank, marks=needs_openvino),
        ("torch-export", lambda: tiny_model("bert")),
    ],
)
def test_the_command_exports_a_saved_folder(format, model, tokenizer, tmp_path, capsys):
    model = model()
    save(model, tokenizer, tmp_path / "saved")
    (tmp_path / "texts.txt").write_text(
        "the red cat\n\nthe owl sees a cow\na dog\n", encoding="utf-8"
    )
    main([str(tmp_path / "saved"), "--format", format, "--texts", str(tmp_path / "texts.txt")])
    assert "100 % of the decisions" in capsys.readouterr().out
    batches = check_batches(tokenizer, list(SENTENCES), 30, tokenizer.model_input_names)
    assert {len(batch["input_ids"]) for batch in batches} == {1, 3}
    assert any(batch["input_ids"].shape[1] % 2 for batch in batches)
    chosen = find_format(format)
    run = chosen.load(tmp_path / "saved" / chosen.target)
    assert difference(run, model, batches)[0] <= TOLERANCE


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_the_old_file(
    tokenizer, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "model.pt2"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match="int8 is not for torch-export"):
        export(low_rank(), tokenizer, path, "torch-export", int8=True)
    with pytest.raises(UserError, match="unknown format"):
        export(low_rank(), tokenizer, path, "tflite")
    with pytest.raises(UserError, match="unfuse_"):
        export(fuse_(low_rank()), tokenizer, path, "torch-export")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match="needs onnx and onnxscript and onnxruntime; pip install"
        ):
            export(low_rank(), tokenizer, path)
    with monkeypatch.context() as patch:
        patch.setattr("bert_decomp.exporting.export.difference", lambda *ignored: (1.0, 0.5))
        with pytest.raises(UserError, match="nothing was written"):
            export(low_rank(), tokenizer, path, "torch-export")
    (tmp_path / "short.txt").write_text("one\n", encoding="utf-8")
    save(low_rank(), tokenizer, tmp_path / "saved")
    capsys.readouterr()
    assert command(main, [str(tmp_path / "saved"), "--texts", str(tmp_path / "short.txt")]) == 2
    assert command(main, [str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert path.read_text(encoding="utf-8") == "old" and not list(tmp_path.glob(".partial*"))


def test_the_command_writes_a_plain_folder_once(tokenizer, tmp_path, capsys):
    save(low_rank(), tokenizer, tmp_path / "saved")
    line = [str(tmp_path / "saved"), "--dense", "--output", str(tmp_path / "plain")]
    assert command(main, line) == 0
    assert "a plain transformers folder" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    assert not hasattr(config, "quantization_config")
    assert command(main, line) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert command(main, [*line, "--int8"]) == 2


def test_a_folder_without_a_head_gets_no_random_one(encoder_folder, tmp_path, capsys):
    plain = tmp_path / "plain"
    for options in ([], ["--format", "onnx"], ["--format", "torch-export"], ["--int8"]):
        assert command(main, [str(encoder_folder), *options]) == 2
        assert "not a fine-tuned classifier (its config names BertModel)" in capsys.readouterr().err
    assert not [path for path in encoder_folder.rglob("*") if path.suffix in (".onnx", ".pt2")]
    # A plain folder needs no head.
    assert command(main, [str(encoder_folder), "--dense", "--output", str(plain)]) == 0
    before, after = (AutoModel.from_pretrained(path) for path in (encoder_folder, plain))
    assert AutoConfig.from_pretrained(plain).architectures == ["BertModel"]
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_dense_folder_keeps_its_head_or_is_refused(encoder_folder, capsys):
    config = encoder_folder / "config.json"
    text = config.read_text(encoding="utf-8").replace("BertModel", "BertForMaskedLM")
    config.write_text(text, encoding="utf-8")
    assert command(main, [str(encoder_folder), "--dense"]) == 2
    assert "is a BertForMaskedLM, whose head would be lost" in capsys.readouterr().err
