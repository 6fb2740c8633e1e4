"""Exported files give torch's logits at every batch and length, in every format, and are whole or absent."""

import os
import sys

import pytest
import torch
from exporting.low_rank import low_rank
from optional import needs
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from bert_decomp.errors import UserError
from bert_decomp.exporting import export as exporting
from bert_decomp.exporting import onnx
from bert_decomp.exporting.export import (
    TOLERANCE,
    difference,
    export,
    tolerance,
)
from bert_decomp.exporting.formats import find_format
from bert_decomp.io.atomic import atomic_file
from bert_decomp.models.saving import save

# Exporters and their runtimes are optional; the refusal without them is tested either way.
needs_onnx, needs_openvino = needs("export"), needs("openvino")


def odd_batches(names):
    """Sizes that the trace has not seen."""
    found = [tiny_batch(rows, length) for rows, length in ((1, 2), (1, 13), (3, 7), (5, 19))]
    return [
        {
            name: batch[name] if name in batch else torch.ones_like(batch["input_ids"])
            for name in names
        }
        for batch in found
    ]


# RoBERTa and ELECTRA share BERT's layers, CamemBERT all of XLM-RoBERTa's code, and masks, relative positions and local
# attention are all in three families: the trace that the formats start from is tested for every one.
FAMILY_FORMATS = {
    "torch-export": sorted(FAMILY_SIZES),
    "onnx": sorted(set(FAMILY_SIZES) - {"roberta", "camembert", "electra"}),
    "openvino": ["bert", "modernbert", "mpnet"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_every_family_in_its_formats(family, tokenizer, tmp_path):
    model, missing = low_rank(family), []
    if family == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for format in (name for name, families in FAMILY_FORMATS.items() if family in families):
        try:
            load = find_format(format).load
        except UserError as error:
            missing.append(str(error))
            continue
        folder = tmp_path / format
        folder.mkdir()
        worst, same = export(model, tokenizer, folder / "model", format)
        assert worst <= TOLERANCE and same == 1, format
        assert [file.name for file in folder.iterdir()] == ["model"]
        batches = odd_batches(tokenizer.model_input_names)
        assert difference(load(folder / "model"), model, batches)[0] <= TOLERANCE, format
    assert "openvino_telemetry" not in {name for name, module in sys.modules.items() if module}
    if missing:
        pytest.skip("; ".join(missing))


@pytest.mark.slow
@needs_openvino
def test_openvino_in_int8_is_smaller_close_and_read_by_other_libraries(tokenizer, tmp_path):
    model = tiny_model("bert", vocab_size=4096, num_hidden_layers=1)
    for _ in range(2):  # the second export takes the place of the first
        exact, _ = export(model, tokenizer, tmp_path / "exact", "openvino")
    worst, _ = export(model, tokenizer, tmp_path / "small", "openvino", int8=True)
    weights = [
        (tmp_path / name / "openvino_model.bin").stat().st_size for name in ("exact", "small")
    ]
    assert weights[1] < 0.6 * weights[0] and exact < worst < 0.2
    import openvino as library  # after the exports, which keep its telemetry out

    graph = library.Core().read_model(tmp_path / "small" / "openvino_model.xml")
    assert [port.get_any_name() for port in graph.inputs] == tokenizer.model_input_names
    assert [port.get_any_name() for port in graph.outputs] == ["logits"]
    assert AutoConfig.from_pretrained(tmp_path / "small").num_labels == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "small").pad_token == "[PAD]"


@pytest.mark.slow
@needs_openvino
def test_an_export_takes_the_place_of_an_export_and_of_nothing_else(tokenizer, tmp_path):
    save(low_rank(), tokenizer, tmp_path / "saved")
    before = sorted(file.name for file in (tmp_path / "saved").iterdir())
    with pytest.raises(UserError, match="holds other files"):
        export(low_rank(), tokenizer, tmp_path / "saved", "openvino")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
@needs_onnx
def test_int8_is_smaller_and_close(tokenizer, tmp_path):
    model = tiny_model("bert", vocab_size=4096, num_hidden_layers=1)
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    exact, _ = export(model, tokenizer, whole)
    worst, _ = export(model, tokenizer, small, int8=True)
    assert small.stat().st_size < 0.6 * whole.stat().st_size and exact < worst < 0.2


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("int8", [False, True])
def test_weights_above_the_limit_of_a_file_are_beside_it(int8, tokenizer, tmp_path, monkeypatch):
    """The limit of 2 GiB made small: what is tested is the path, not the size."""
    model = tiny_model("bert", vocab_size=4096, num_hidden_layers=1)
    path = tmp_path / "model.onnx"
    data = tmp_path / "model.onnx.data"
    export(model, tokenizer, path, int8=int8)
    inside = path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr("bert_decomp.exporting.onnx.SIZE_LIMIT", 1000)
        worst, same = export(model, tokenizer, path, int8=int8)
    if int8:
        # Quantised, the weights are a quarter, and in the file again.
        assert worst < 0.2 and not data.exists()
    else:
        assert worst <= TOLERANCE and same == 1
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert data.stat().st_size > 0.9 * weights
        assert path.stat().st_size < inside - 0.9 * weights
        assert data.stat().st_mode == path.stat().st_mode
    run = onnx.load(path)
    assert difference(run, model, odd_batches(tokenizer.model_input_names))[0] < 0.2
    export(model, tokenizer, path, int8=int8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("before", ["nothing", "one file", "a pair"])
@pytest.mark.parametrize("after", ["one file", "a pair"])
def test_a_kill_leaves_no_file_beside_weights_of_another(before, after, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def pair(folder, number, has_data):
        folder.mkdir(exist_ok=True)
        (folder / "model.onnx").write_text(f"{number} {has_data}", encoding="utf-8")
        if has_data:
            (folder / "model.onnx.data").write_text(number, encoding="utf-8")

    for step in range(5):
        folder = tmp_path / str(step)
        if before != "nothing":
            pair(folder, "old", before == "a pair")
        folder.mkdir(exist_ok=True)
        calls = iter(range(5))

        def dying(call, calls=calls, step=step):
            def made(*args):
                if next(calls) == step:
                    raise Killed
                return call(*args)

            return made

        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (exporting, "remove")):
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                with atomic_file(folder / "model.onnx") as temporary:
                    pair(temporary.parent, "new", after == "a pair")
                    exporting._place_data(temporary, folder / "model.onnx", ".data")
            except Killed:
                pass
        if (folder / "model.onnx").exists():
            number, has_data = (folder / "model.onnx").read_text(encoding="utf-8").split()
            if has_data == "True":
                assert (folder / "model.onnx.data").read_text(encoding="utf-8") == number
    assert number == "new", "the last step is beyond the end"


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, dtype",
    [
        pytest.param("onnx", torch.float16, marks=needs_onnx),
        ("torch-export", torch.float16),
        ("torch-export", torch.bfloat16),
        pytest.param("openvino", torch.bfloat16, marks=needs_openvino),
    ],
)
def test_half_precision(format, dtype, tokenizer, tmp_path, monkeypatch):
    save(low_rank().to(dtype), tokenizer, tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype="auto")
    path = tmp_path / "exported"
    worst, _ = export(model.eval(), tokenizer, path, format)
    assert 4 * torch.finfo(dtype).eps > TOLERANCE and path.stat().st_size
    batches = odd_batches(tokenizer.model_input_names)
    assert tolerance(model, batches) < 0.2
    assert difference(find_format(format).load(path), model, batches)[0] <= tolerance(
        model, batches
    )
    with monkeypatch.context() as patch:
        patch.setattr("bert_decomp.exporting.export.difference", lambda *ignored: (worst, 1.0))
        patch.setattr("bert_decomp.exporting.export.tolerance", lambda *ignored: worst / 2 - 1e-9)
        with pytest.raises(UserError, match="nothing was written"):
            export(model, tokenizer, path, format)


@needs_onnx
@pytest.mark.slow
def test_bfloat16_is_refused_where_nothing_runs_it(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no bfloat16 on a CPU; call \.float\(\) or \.half\(\)"):
        export(low_rank().bfloat16(), tokenizer, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
