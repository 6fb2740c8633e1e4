"""Folders as people have them: loaded, or refused with the command that helps."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import made_once, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from bert_decomp import DecompositionConfig, decompose_, save
from bert_decomp.errors import UserError
from bert_decomp.io.manifest import write_manifest
from bert_decomp.models.loading import load_model, load_tokenizer

BATCH = {name: value for name, value in tiny_batch().items() if name != "labels"}


@made_once
def low_rank(family="bert"):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    return model


def outputs(model):
    with torch.no_grad():
        return model(**BATCH)[0]


def rewrite(folder, rename):
    """Rename the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = {rename(name): value.clone() for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def command_of(error):
    """Run the Python command at the end of a message."""
    message = str(error.value)
    assert "\n" not in message
    words = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_with_and_without_a_head(family, tmp_path):
    model = low_rank(family)
    save(model, None, tmp_path / "classifier")
    base = AutoModel.from_pretrained(tmp_path / "classifier").eval()
    assert torch.equal(outputs(base), outputs(model.base_model))
    save(base, None, tmp_path / "encoder")
    again = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert torch.equal(outputs(again), outputs(base))
    headed = load_model(str(tmp_path / "encoder"), num_labels=3)
    assert headed.num_labels == 3
    assert torch.equal(outputs(headed.base_model), outputs(base))


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_of_a_wrapped_model(wrapper, tmp_path):
    model = low_rank()
    save(model, None, tmp_path)
    rewrite(tmp_path, lambda name: wrapper + name)
    with pytest.raises(UserError, match=f"named {wrapper}.*rename them: python -c") as error:
        load_model(str(tmp_path))
    command_of(error)
    assert torch.equal(outputs(load_model(str(tmp_path))), outputs(model))


@pytest.mark.slow
def test_pickled_weights(tmp_path):
    model = tiny_model("bert")
    save(model, None, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="never opened; convert them: python -c") as error:
        load_model(str(tmp_path))
    command_of(error)
    assert torch.equal(outputs(load_model(str(tmp_path))), outputs(model))


def test_an_adapter(tmp_path):
    save(tiny_model("bert"), None, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="an adapter, not a model; merge the two: python -c"
    ) as error:
        load_model(str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    # peft is not installed: that a shell takes the command as it stands is what can be checked.
    *_, code = shlex.split(message[message.index("python -c") :])
    assert f"from_pretrained({str(tmp_path)!r})" in code
    compile(code, "command", "exec")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_of_another_package_is_ignored_with_a_warning(key, tmp_path, caplog):
    model = low_rank()
    save(model, None, tmp_path)
    edit_config(tmp_path, **{key: "flash_attention_2"})
    loaded = load_model(str(tmp_path))
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert "flash_attention_2; it is ignored" in caplog.text
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.slow
def test_transformers_alone_refuses_the_folder_by_name(tmp_path):
    model = low_rank()
    save(model, None, tmp_path / "head")
    save(model.base_model, None, tmp_path / "headless")
    script = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    for name in ('AutoModelForSequenceClassification', 'AutoModel', 'BertModel'):\n"
        "        try: getattr(transformers, name).from_pretrained(folder)\n"
        "        except RuntimeError: print(folder, name, 'refused')\n"
    )
    folders = [str(tmp_path / name) for name in ("head", "headless")]
    result = subprocess.run(
        [sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True
    )
    for folder in folders:
        assert result.stdout.count(f"{folder} ") == 3
    assert result.stderr.count("Unknown quantization type, got low_rank") == 6
    assert result.stderr.count("encoder.layer.0.attention.self.query.weight") == 6


def test_folders_of_version_1_load(tmp_path):
    """They have no placeholder. Saved again, they have one."""
    model = low_rank()
    save(model, None, tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    placeholders = [name for name, value in tensors.items() if not value.numel()]
    assert placeholders == ["bert.encoder.layer.0.attention.self.query.weight"]
    del tensors[placeholders[0]]
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    quantization = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path / "old", quantization_config={**quantization, "version": 1})
    for loaded in (
        load_model(str(tmp_path / "old")),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "old").eval(),
    ):
        assert torch.equal(outputs(loaded), outputs(model))
    save(loaded, None, tmp_path / "new")
    assert placeholders[0] in load_file(tmp_path / "new" / "model.safetensors")


def test_a_dense_weight_beside_its_factors_is_refused(tmp_path):
    save(low_rank(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.query.weight"] = torch.zeros(36, 36)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"wrongly shaped tensors: bert.encoder.*query.weight"):
        load_model(str(tmp_path))


def test_a_file_loads_into_the_model_it_was_saved_from(tmp_path):
    model = low_rank()
    save(model, None, tmp_path)
    wanted = outputs(model)
    with torch.no_grad():
        model.classifier.weight.zero_()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(model), wanted)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_modes(mask, tmp_path):
    before = os.umask(mask)
    try:
        save(low_rank(), tiny_tokenizer(), tmp_path / "new" / "model")
        checkpoint = tmp_path / "checkpoint"
        low_rank().save_pretrained(checkpoint)
        write_manifest(checkpoint)
    finally:
        os.umask(before)
    for folder in (tmp_path / "new", checkpoint):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_folder_without_a_tokenizer_is_refused(family, tmp_path):
    """transformers makes one of the special tokens alone, which takes each word for the unknown one."""
    save(tiny_model(family), None, tmp_path / "model")
    with pytest.raises(UserError, match="knows no words; put the model's own tokenizer there"):
        load_tokenizer(str(tmp_path / "model"))
