"""Folders of int8 models: a quarter of the size, right on other processors, refused where they are damaged."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from runtime.forms import partly_low_rank, relative
from safetensors.torch import load_file, save_file
from tiny_models import ANIMALS, COLOURS, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from bert_decomp import (
    DecompositionConfig,
    Predictor,
    decompose_,
    distil,
    export,
    fuse_,
    predict,
    save,
    unfuse_,
)
from bert_decomp.errors import UserError
from bert_decomp.exporting.dense import dense
from bert_decomp.models.format import FORMAT_VERSION
from bert_decomp.models.loading import load_model
from bert_decomp.runtime import int8, quantised
from bert_decomp.runtime.int8_blocks import Encoded

LAYER = "bert.encoder.layer.1."
QUERY = f"{LAYER}attention.self.query"


def batch():
    names = ("input_ids", "attention_mask")
    return {name: tiny_batch(20, 13)[name] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An int8 model of factors and, in the middle, of dense layers."""
    path = tmp_path_factory.mktemp("int8") / "model"
    save(fuse_(partly_low_rank(), dtype="int8", calibration=[batch()]), tiny_tokenizer(), path)
    return path


@torch.no_grad()
def logits(path):
    return AutoModelForSequenceClassification.from_pretrained(path)(**batch()).logits


def test_a_folder_has_a_quarter_of_the_bytes_and_no_matrix_in_float32(tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 768, "vocab_size": 2000}
    model = tiny_model("bert", **sizes)
    save(model, None, tmp_path / "float")
    save(fuse_(model, dtype="int8", calibration=[batch()]), None, tmp_path / "int8")
    whole, small = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")
    )
    assert small < 0.31 * whole
    loaded = load_model(str(tmp_path / "int8"))
    inside = [
        (name, value)
        for name, value in loaded.state_dict().items()
        if ".layer." in name or "word_embeddings" in name
    ]
    assert max(value.numel() for _, value in inside if value.dtype == torch.float32) == 2000
    assert {value.dtype for name, value in inside if value.numel() >= 192 * 192} == {torch.int8}
    # The form that runs has none, either, beside that state.
    assert not [x for x in loaded.base_model.encoder.parameters() if x.ndim > 1]


@torch.no_grad()
def test_a_block_in_float32_stays_so(tmp_path, monkeypatch):
    model = partly_low_rank()
    monkeypatch.setattr(int8, "TOLERANCE", 0.0085)
    fuse_(model, dtype="int8", calibration=[batch()])
    exact = model.base_model.encoder.quality.exact
    assert 0 < len(exact) < 9
    save(model, None, tmp_path / "some")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "some")
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert loaded.base_model.encoder.quality.exact == exact
    monkeypatch.setattr(int8, "TOLERANCE", 0.0)
    model = fuse_(partly_low_rank(), dtype="int8", calibration=[batch()])
    save(model, None, tmp_path / "all")
    assert torch.equal(logits(tmp_path / "all"), model(**batch()).logits)


def test_bytes_are_those_of_the_processor_that_loads(folder, monkeypatch):
    """A processor without VNNI takes 7 bits of what one with VNNI wrote in 8, and the other way round."""
    wanted = logits(folder)
    for top in (127, 255):
        monkeypatch.setattr(quantised, "largest_code", lambda top=top: top)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        blocks = [module for module in model.modules() if isinstance(module, Encoded)]
        assert len(blocks) == 9 and {block.codes.top for block in blocks} == {top}
        if top == 127:
            with torch.no_grad():
                assert relative(model(**batch()).logits, wanted) < 0.05


@pytest.mark.slow
def test_a_fresh_process_with_fewer_instructions(folder, tmp_path):
    """oneDNN and the compiled kernels with AVX2 alone: the same logits up to int8's error, without calibration."""
    script = f"""
import torch, bert_decomp
from safetensors.torch import load_file, save_file
from lowrank_kernels import cpu
from transformers import AutoModelForSequenceClassification
cpu.levels = lambda levels=cpu.levels(): levels[-1:]
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r})
with torch.no_grad():
    logits = model(**load_file({str(tmp_path / "batch")!r})).logits
save_file({{"logits": logits}}, {str(tmp_path / "logits")!r})
"""
    save_file(batch(), tmp_path / "batch")
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], env=limited, check=True)
    assert relative(load_file(tmp_path / "logits")["logits"], logits(folder)) < 0.05


def tensor(name, change):
    """Another tensor in the place of ``name``, or none."""

    def damage(path):
        state = load_file(path / "model.safetensors")
        value = change(state.pop(name))
        save_file(state if value is None else {**state, name: value}, path / "model.safetensors")

    return damage


def entry(*keys, to):
    """Another value in the config's entry of this package; none for ``...``."""

    def damage(path):
        values = json.loads((path / "config.json").read_text())
        *inner, last = ("quantization_config", *keys)
        place = values
        for key in inner:
            place = place[key]
        if to is ...:
            del place[last]
        else:
            place[last] = to
        (path / "config.json").write_text(json.dumps(values))

    return damage


def config(**changes):
    def damage(path):
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, **changes}))

    return damage


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


DENSE = {"int8": "linear", "in_features": 36, "out_features": 36, "rank": 0, "bias": True}
DAMAGES = {
    "a tensor is missing": (tensor(f"{QUERY}.up", lambda x: None), "lacks tensors: .*query.up"),
    "a scale is missing": (tensor(f"{QUERY}.up_scale", lambda x: None), "lacks tensors"),
    "another shape": (tensor(f"{QUERY}.up", lambda x: x[1:].clone()), "wrongly shaped"),
    "bytes as floats": (tensor(f"{QUERY}.up", lambda x: x.float()), "weights in int8 where"),
    "floats as bytes": (tensor(f"{QUERY}.bias", lambda x: x.char()), "weights in int8 where"),
    "words": (tensor(f"{QUERY}.up", lambda x: x.int()), "in I32"),
    "a range without end": (tensor(f"{QUERY}.inputs", lambda x: x * torch.inf), "cannot be"),
    "a range turned": (tensor(f"{QUERY}.inputs", lambda x: x.flip(0)), "query.inputs that cannot"),
    "a scale of zero": (tensor(f"{QUERY}.up_scale", lambda x: x * 0), "up_scale that cannot"),
    "a balance below": (tensor(f"{QUERY}.balance", lambda x: -x), "balance that cannot"),
    "a bias of NaN": (tensor(f"{QUERY}.bias", lambda x: x * torch.nan), "bias that cannot"),
    "query and key differ": (tensor(f"{QUERY}.inputs", lambda x: 2 * x), "take different bytes"),
    "cut off": (cut, "not a whole safetensors file"),
    "a later version": (
        entry("version", to=FORMAT_VERSION + 1),
        "load the model with the bert_decomp that wrote",
    ),
    "no quality": (entry("int8", to=...), "malformed low-rank entry"),
    "quality of text": (entry("int8", "difference", to="small"), "malformed int8 entry"),
    "quality beside": (entry("int8", "more", to=1), "malformed int8 entry"),
    "a rank of text": (entry("modules", QUERY, "rank", to="9"), "malformed low-rank entry"),
    "a width of bool": (entry("modules", QUERY, "in_features", to=True), "malformed low-rank"),
    "a rank above": (entry("modules", QUERY, "rank", to=10**9), "which it cannot have"),
    "a width above": (entry("modules", QUERY, "in_features", to=37), "which it cannot have"),
    "a module of none": (
        entry("modules", "bert.pooler.x", to={**DENSE, "outliers": 0}),
        "which it does not have",
    ),
    "a norm": (
        entry("modules", f"{LAYER}output.LayerNorm", to={**DENSE, "outliers": 0}),
        "not a linear layer",
    ),
    "not the words": (
        entry(
            "modules", "bert.embeddings.position_embeddings", to={"int8": "embedding", "rank": 0}
        ),
        "not its word embedding",
    ),
    "another activation": (config(hidden_act="silu"), "silu has no int8 form"),
    "another number of heads": (config(num_attention_heads=5), "cannot load"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder, name, tmp_path):
    damage, message = DAMAGES[name]
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(path))
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_together_reach_no_kernel(folder, tmp_path):
    """A feed-forward of fewer neurons in one half alone, tensors and config of one mind."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    name = f"{LAYER}intermediate.dense"
    entry("modules", name, "out_features", to=40)(path)
    for part in ("up", "up_scale", "bias"):
        tensor(f"{name}.{part}", lambda x: x[:40].clone())(path)
    with pytest.raises(UserError, match="sizes that do not fit together"):
        load_model(str(path))


def test_what_a_saved_int8_model_is_not_for(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert fuse_(model) is model
    with pytest.raises(UserError, match="leave dtype, calibration and graphs out"):
        fuse_(model, dtype="int8", calibration=[batch()])
    with pytest.raises(UserError, match="saved in int8 without its float32 weights"):
        unfuse_(model)
    refused = {
        "decomposed": lambda: decompose_(model, DecompositionConfig("svd", rank=3)),
        "exported": lambda: export(model, tiny_tokenizer(), tmp_path / "x", "torch-export"),
        "made dense": lambda: dense(model),
        "distilled": lambda: distil(model, partly_low_rank(), None, tiny_tokenizer()),
    }
    for what, call in refused.items():
        with pytest.raises(UserError, match=f"saved in int8 and cannot be {what}; take the folder"):
            call()
    with pytest.raises(UserError, match=r"cannot be moved or cast$"):
        model.double()
    with pytest.raises(UserError, match="cannot be trained"):
        model.train()
    for options in ({"dtype": torch.bfloat16}, {"device_map": "cuda"}):
        with pytest.raises(UserError, match=f"load it without {next(iter(options))}"):
            AutoModel.from_pretrained(folder, **options)
    assert AutoModel.from_pretrained(folder, device_map="auto").device.type == "cpu"


def test_without_this_package_the_folder_is_refused(folder, tmp_path):
    """transformers leaves out an entry that it does not know, and finds a tensor that fits no dense model."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    config(quantization_config=None)(path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(path)


@torch.no_grad()
def test_the_exported_folder_is_what_predictions_run(tmp_path):
    model, tokenizer = partly_low_rank(), tiny_tokenizer()
    texts = [f"the {colour} {animal} sees a cow" for colour in COLOURS for animal in ANIMALS]
    with pytest.raises(UserError, match="give int8 and texts"):
        export(model, tokenizer, tmp_path / "int8", "fused", texts=texts)
    with pytest.raises(UserError, match="give int8 and texts"):
        export(model, tokenizer, tmp_path / "int8", "fused", int8=True)
    worst, same = export(model, tokenizer, tmp_path / "int8", "fused", int8=True, texts=texts)
    assert 0 < worst < 0.1 and same > 0.9
    assert not any(isinstance(module, Encoded) for module in model.modules())
    folder = str(tmp_path / "int8")
    found = torch.from_numpy(Predictor(folder, device="cpu")(texts))
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert 0 < relative(found, model(**batch).logits) < 0.1
    for wrong in (
        lambda: Predictor(folder, calibration=[texts]),
        lambda: predict(folder, "x.csv", tmp_path / "x.parquet", int8=True),
    ):
        with pytest.raises(UserError, match="is int8 already"):
            wrong()
