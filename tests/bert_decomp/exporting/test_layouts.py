"""Folders for other libraries have the names and types by which their loaders find a model.

optimum-onnx, optimum-intel and text-embeddings-inference do not install beside this project's versions: what they read
is checked here by the names in their source.
"""

import json
from itertools import pairwise

import pytest
import torch
from optional import needs
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import tiny_model

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.exporting.dense import dense
from bert_decomp.exporting.export import SENTENCES, export
from bert_decomp.exporting.formats import find_format
from bert_decomp.kinds import EMBEDDING
from bert_decomp.kinds.pooling import read_pooling
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save

NAMES = {0: "cold", 1: "mild", 2: "hot"}


def low_rank():
    model = tiny_model("bert", num_hidden_layers=1, id2label=NAMES)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    return model


@pytest.mark.slow
@needs("export")
def test_a_folder_of_optimum(tokenizer, tmp_path):
    import onnxruntime

    export(low_rank(), tokenizer, tmp_path / "model", "optimum", int8=True)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    config, settings = (
        json.loads((tmp_path / "model" / name).read_text())
        for name in ("config.json", "tokenizer_config.json")
    )
    assert config["id2label"] == {str(index): name for index, name in NAMES.items()}
    assert "quantization_config" not in config and config["pad_token_id"] == 0
    # transformers 4, which optimum-onnx needs, knows this one.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    wanted = {"input_ids", "attention_mask", "token_type_ids"} & set(tokenizer.model_input_names)
    assert {(one.name, one.type) for one in session.get_inputs()} == {
        (name, "tensor(int64)") for name in wanted
    }
    (output,) = session.get_outputs()
    assert (output.name, output.type) == ("logits", "tensor(float)")


@pytest.mark.slow
@needs("export")
@needs("openvino")
def test_an_encoder_keeps_its_pooling(tokenizer, tmp_path):
    """Names of sentence-transformers' files; token vectors pooled by them are its vectors."""
    save(tiny_model("bert", num_hidden_layers=1).base_model, tokenizer, tmp_path / "bare")
    parts = [Transformer(str(tmp_path / "bare")), Pooling(36, pooling_mode="cls"), Normalize()]
    encoder = SentenceTransformer(modules=parts, device="cpu")
    encoder.save(str(tmp_path / "encoder"))
    model = load_model(str(tmp_path / "encoder"), EMBEDDING)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    save(dense(model), tokenizer, tmp_path / "plain")
    wanted = SentenceTransformer(str(tmp_path / "plain"), device="cpu").encode(list(SENTENCES))
    batch = tokenizer(list(SENTENCES), padding=True, truncation=True, return_tensors="pt")
    for name in ("optimum", "openvino"):
        export(model, tokenizer, tmp_path / name, name)
        modules = json.loads((tmp_path / name / "modules.json").read_text())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        assert kinds == ["Transformer", "Pooling", "Normalize"]
        pooling = read_pooling(tmp_path / name)
        assert pooling == read_pooling(tmp_path / "encoder") and pooling.modes == ("cls",)
        hidden = find_format(name).load(tmp_path / name)(batch)
        found = pooling(hidden, batch["attention_mask"]).numpy()
        assert abs(found - wanted).max() <= 1e-5
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "optimum" / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["last_hidden_state"]


def test_sentence_transformers_reads_a_dense_folder(tokenizer, tmp_path):
    model = low_rank()
    save(dense(model), tokenizer, tmp_path / "plain")
    pairs = list(pairwise(SENTENCES))
    found = CrossEncoder(str(tmp_path / "plain"), device="cpu").predict(
        pairs, convert_to_tensor=True, activation_fn=torch.nn.Identity()
    )
    batch = tokenizer(pairs, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**batch).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
