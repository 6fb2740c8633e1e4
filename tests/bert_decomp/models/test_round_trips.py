"""Every form of a model comes back equal from every way of storing, copying and using it."""

import copy
import pickle

import pytest
import torch
from cases import resized
from safetensors.torch import load_file, save_file
from tiny_models import made_once, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.models.embedding import LowRankEmbedding
from bert_decomp.models.replacement import Replacement
from bert_decomp.models.saving import mark_low_rank, save
from bert_decomp.runtime import fuse_, int8_encoder, unfuse_
from lowrank_kernels import LowRankLinear

TEXTS = ["the red cat sees a dog", "a hen", "the owl is a grey cow"]


@made_once
def low_rank(family="bert"):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=7, exclude=["*.1.*"]), progress=False)
    return model


@made_once
def factored_embedding(family="bert"):
    model = low_rank(family)
    dense = model.get_input_embeddings()
    model.set_input_embeddings(
        LowRankEmbedding(dense.num_embeddings, dense.embedding_dim, 5, dense.padding_idx)
    )
    mark_low_rank(model)
    return model


@made_once
def half(family):
    """In bfloat16 as transformers loads it: buffers such as rotary frequencies stay in float32."""
    model = low_rank(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


FORMS = {
    "dense": tiny_model,
    "low-rank": low_rank,
    "factored embedding": factored_embedding,
    "fused": lambda family: fuse_(low_rank(family)),
    "fused, factored embedding": lambda family: fuse_(factored_embedding(family)),
    "structured": resized,
    "fused, structured": lambda family: fuse_(resized(family)),
    "half": half,
    "fused half": lambda family: fuse_(half(family)),
    "headless": lambda family: low_rank(family).base_model,
    "fused headless": lambda family: fuse_(low_rank(family).base_model),
}
FAMILIES = ("bert", "distilbert", "mpnet", "modernbert")
every_form = pytest.mark.parametrize("form", FORMS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def output(model):
    """Logits, or the last hidden states of real tokens of a headless model."""
    batch = tiny_batch()
    del batch["labels"]
    result = model(**batch)
    if "logits" in result:
        return result.logits
    return result.last_hidden_state[batch["attention_mask"].bool()]


def is_headless(form):
    return "headless" in form


def unfused(form):
    """The name of the form that a fused one stands for."""
    return {
        "fused": "low-rank",
        "fused, factored embedding": "factored embedding",
        "fused, structured": "structured",
        "fused half": "half",
        "fused headless": "headless",
    }.get(form, form)


def other_values(model):
    """The same model with other values."""
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point():
                value.copy_(torch.randn_like(value))
    return model


def auto_class(form):
    return AutoModel if is_headless(form) else AutoModelForSequenceClassification


def load(folder, form):
    return auto_class(form).from_pretrained(folder, dtype="auto").eval()


@every_form
@every_family
def test_save_and_load(family, form, tmp_path):
    model, wanted = FORMS[form](family), output(FORMS[unfused(form)](family))
    save(model, tiny_tokenizer(), tmp_path / "one")
    loaded = load(tmp_path / "one", form)
    assert loaded.dtype == model.dtype
    assert torch.equal(output(loaded), wanted)
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(output(load(tmp_path / "two", form)), wanted)
    model.save_pretrained(tmp_path / "three")
    assert torch.equal(output(load(tmp_path / "three", form)), wanted)


@pytest.mark.slow
@every_form
def test_sharded_folders(form, tmp_path):
    model = FORMS[form]("bert")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(output(load(tmp_path, form)), output(FORMS[unfused(form)]("bert")))


@pytest.mark.slow
@every_form
@every_family
def test_state_dict(family, form, tmp_path):
    model = FORMS[form](family)
    plain, wanted = FORMS[unfused(form)](family), output(model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    save_file(state, tmp_path / "state.safetensors")
    for source in (copy.deepcopy(state), load_file(tmp_path / "state.safetensors")):
        for target, expected in ((model, wanted), (plain, output(plain))):
            for assign in (False, True):
                other_values(target)
                assert not torch.equal(output(target), expected)
                target.load_state_dict({**source}, assign=assign)
                assert torch.equal(output(target), expected)


@every_form
def test_a_state_dict_that_does_not_fit_is_refused(form):
    model = FORMS[form]("bert")
    state = copy.deepcopy(model.state_dict())
    name = next(name for name in state if "layer.0.attention.self.query" in name)
    prefix = name.rpartition(".")[0]
    missing = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        model.load_state_dict(missing)
    result = model.load_state_dict(missing, strict=False)
    assert result.missing_keys == [name] and not result.unexpected_keys
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{prefix}.other"'):
        model.load_state_dict({**state, f"{prefix}.other": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=f"size mismatch for .*{name.rpartition('.')[2]}"):
        model.load_state_dict({**state, name: torch.zeros(3, 5)})


@pytest.mark.slow
@every_form
@every_family
def test_copies(family, form):
    model = FORMS[form](family)
    wanted = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), wanted)
        other_values(twin)
        assert torch.equal(output(model), wanted), "the copy shares values with its original"
        twin.load_state_dict(model.state_dict())
        assert torch.equal(output(twin), wanted)


@every_form
def test_changes_of_dtype(form, tmp_path):
    save(FORMS[form]("bert"), None, tmp_path / "model")
    model = load(tmp_path / "model", form)
    if form.startswith("fused"):
        fuse_(model)
    for change, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.to(torch.float16), torch.float16),
    ):
        assert change(model) is model
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert output(model).dtype == dtype


@pytest.mark.slow
@every_form
def test_pipelines(form, tmp_path):
    model, tokenizer = FORMS[form]("bert"), tiny_tokenizer()
    save(model, tokenizer, tmp_path / "model")
    loaded = load(tmp_path / "model", form)
    if form.startswith("fused"):
        fuse_(loaded)
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            result = loaded(**batch)
        if is_headless(form):
            run = pipeline("feature-extraction", model=loaded, tokenizer=tokenizer)
            assert torch.equal(
                run(text, return_tensors="pt").to(loaded.dtype), result.last_hidden_state
            )
        else:
            run = pipeline("text-classification", model=loaded, tokenizer=tokenizer, top_k=None)
            scores = {entry["label"]: entry["score"] for entry in run([text])[0]}
            for index, value in enumerate(result.logits[0].float().softmax(0)):
                assert scores[f"LABEL_{index}"] == pytest.approx(value.item(), abs=1e-6)


@pytest.mark.slow
@every_form
def test_sentence_transformers(form, tmp_path):
    # Only these tests need it, and it takes seconds to import.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    model, tokenizer = FORMS[form]("bert"), tiny_tokenizer()
    save(model, tokenizer, tmp_path / "model")
    transformer = Transformer(str(tmp_path / "model"))
    st = SentenceTransformer(modules=[transformer, Pooling(36, "mean")], device="cpu")
    if form.startswith("fused"):
        fuse_(st[0].auto_model)
        assert any(isinstance(module, Replacement) for module in st.modules())
    elif form != "dense":
        assert any(isinstance(module, LowRankLinear) for module in st.modules())
    # Fused and unfused sums are rounded in another order.
    bound = 2e-2 if "half" in form else 1e-5
    vectors = st.encode(TEXTS, convert_to_tensor=True)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            hidden = FORMS[unfused(form)]("bert").base_model(**tokenizer(text, return_tensors="pt"))
        mean = hidden.last_hidden_state[0].mean(0)
        assert torch.allclose(vector.float(), mean.float(), atol=bound)
    st.save_pretrained(str(tmp_path / "sentences"))
    again = SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    assert torch.allclose(
        again.encode(TEXTS, convert_to_tensor=True).float(), vectors.float(), atol=bound
    )


INT8_FORMS = {
    "dense": tiny_model,
    "low-rank": low_rank,
    "factored embedding": factored_embedding,
    "structured": resized,
    "headless": lambda family: low_rank(family).base_model,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", INT8_FORMS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_int8_models_are_saved_and_loaded_in_int8(family, form, tmp_path):
    """To the bit, by every way of storing them; until then the state dict is that of what the model stands for."""
    plain = INT8_FORMS[form](family)
    wanted = output(plain)
    model = fuse_(copy.deepcopy(plain), dtype="int8", calibration=[tiny_batch(20, 13)])
    answers = output(model)
    assert not torch.equal(answers, wanted)
    save(model, tiny_tokenizer(), tmp_path / "one")
    model.save_pretrained(tmp_path / "two", max_shard_size="30KB")
    assert len(list((tmp_path / "two").glob("model-*.safetensors"))) > 1
    loaded = load(tmp_path / "one", form)
    loaded.save_pretrained(tmp_path / "three")
    for twin in (
        *(copy.deepcopy(each) for each in (model, loaded)),
        *(pickle.loads(pickle.dumps(each)) for each in (model, loaded)),
        *(load(tmp_path / name, form) for name in ("one", "two", "three")),
    ):
        assert torch.equal(output(twin), answers)
    assert int8_encoder(loaded).quality.exact == int8_encoder(model).quality.exact
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    for each in (model, loaded):
        with pytest.raises(RuntimeError, match="an int8 model takes no other weights"):
            each.load_state_dict(each.state_dict())
    unfuse_(model)
    save(model, tiny_tokenizer(), tmp_path / "four")
    assert torch.equal(output(load(tmp_path / "four", form)), wanted)
