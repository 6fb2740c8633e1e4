"""A compiled encoder called with token ids gives what its model's class gives; what only that can give it leaves."""

import copy

import pytest
import torch
from runtime.forms import encoder_of, inputs, partly_low_rank, relative
from tiny_models import FAMILY_SIZES, tiny_model

from bert_decomp.models.embedding import LowRankEmbedding
from bert_decomp.runtime import fuse_
from bert_decomp.runtime.compiled import CompiledEncoder
from bert_decomp.runtime.int8 import Int8Embedding
from lowrank_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.levels(), reason=str(cpu.why_not()))
LEVELS = cpu.levels() or ("none",)
# ELECTRA's projection behind the embeddings has a test of its own.
POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert", "electra"})
KINDS = ("padded", "no mask", "no padding", "one sentence", "single tokens")


def compile_(model, level=None):
    """The float32 blocks and the embeddings in the kernels."""
    fuse_(model)
    encoder = encoder_of(model)
    encoder.compiled = CompiledEncoder(encoder.layers, level, model.base_model.embeddings)
    return model


def int8(family="bert"):
    batches = [inputs(kind, family) for kind in ("padded", "no padding")]
    return fuse_(partly_low_rank(family), dtype="int8", calibration=batches)


@pytest.fixture
def class_forward(monkeypatch):
    """Calls of the forward pass of bare encoder models' classes, counted."""
    calls = []

    def count(model):
        forward = type(model.base_model).forward

        def counted(*args, **kwargs):
            calls.append(kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(type(model.base_model), "forward", counted)
        return calls

    return count


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_ids_give_the_models_own_numbers(family, level, class_forward):
    model = partly_low_rank(family)
    batches = [inputs(kind, family) for kind in KINDS]
    double = copy.deepcopy(model).double()
    exact = [(double(**batch).logits, double.base_model(**batch)[0]) for batch in batches]
    compile_(model, level)
    calls = class_forward(model)
    for batch, (logits, hidden) in zip(batches, exact, strict=True):
        assert relative(model(**batch).logits, logits) < 2e-5
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        result = model.base_model(**batch)[0]
        assert relative(result[mask], hidden[mask]) < 2e-5
        assert (result[~mask] == 0).all()
    assert not calls


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rank", [None, 7])
@torch.no_grad()
def test_words_in_int8_and_factored_words(rank, level, class_forward):
    model = partly_low_rank()
    if rank is not None:
        model.set_input_embeddings(LowRankEmbedding(64, 36, rank))
    words = Int8Embedding(model.get_input_embeddings())
    exact = copy.deepcopy(model).double()
    exact.set_input_embeddings(torch.nn.Embedding.from_pretrained(_rows(words.rows)))
    batch = inputs("padded", "bert")
    batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    expected = exact(**batch).logits
    fuse_(model)
    model.set_input_embeddings(words)
    encoder = encoder_of(model)
    encoder.compiled = CompiledEncoder(encoder.layers, level, model.base_model.embeddings)
    calls = class_forward(model)
    assert relative(model(**batch).logits, expected) < 2e-5
    assert not calls


def _rows(words):
    """All rows of an int8 embedding in float64."""
    rows = words.codes.double() * words.scale[:, None].double()
    return rows if words.up is None else rows @ words.up.double().t() + words.bias.double()


@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_int8_gives_the_same_by_either_way(family, class_forward):
    model, batch = int8(family), inputs("padded", family)
    calls = class_forward(model)
    by_ids = model(**batch)
    assert not calls
    encoder_of(model).register_forward_hook(lambda *_: None)
    long_way = model(**batch)
    assert len(calls) == 1
    assert by_ids.keys() == long_way.keys()
    # A value between two codes may take either.
    assert relative(by_ids.logits, long_way.logits) < 0.02
    for ids in (batch["input_ids"].int(), batch["input_ids"].t().contiguous().t()):
        assert relative(model(**{**batch, "input_ids": ids}).logits, long_way.logits) < 0.02


@torch.no_grad()
def test_roberta_counts_no_padding_token(class_forward):
    """Not even one that the mask calls real."""
    model = tiny_model("roberta")
    batch = inputs("no padding", "roberta")
    batch["input_ids"][:, [3, 4, 9]] = model.config.pad_token_id
    exact = copy.deepcopy(model).double()(**batch).logits
    calls = class_forward(compile_(model))
    assert relative(model(**batch).logits, exact) < 2e-5
    assert not calls


@torch.no_grad()
def test_what_is_in_no_table_is_refused():
    model = int8()
    words, types = (torch.zeros(2, 5).long() for _ in range(2))
    for wrong in (64, -1):
        words[1, 3] = wrong
        with pytest.raises(IndexError, match=f"token id {wrong} of 64"):
            model(input_ids=words)
    # Behind a sentence nothing is read.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert torch.isfinite(model(input_ids=words, attention_mask=mask).logits).all()
    types[0, 0] = 2
    with pytest.raises(IndexError, match="token type 2 of 2"):
        model(input_ids=words.zero_(), token_type_ids=types)


@torch.no_grad()
def test_what_only_the_class_gives(class_forward):
    model, batch = int8(), inputs("padded", "bert")
    base, ids = model.base_model, batch["input_ids"]
    calls = class_forward(model)
    expected = base(**batch)
    hidden = expected.last_hidden_state
    assert not calls
    first, pooled = base(**batch, return_dict=False)
    assert relative(first, hidden) < 0.02
    assert relative(pooled, expected.pooler_output) < 0.02
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    assert relative(base(**batch, position_ids=positions)[0], hidden) < 0.02
    embedded = base.embeddings.word_embeddings(ids)
    masked = {"attention_mask": batch["attention_mask"]}
    assert relative(base(inputs_embeds=embedded, **masked)[0], hidden) < 0.02
    seen = []
    handle = base.embeddings.register_forward_hook(lambda *_: seen.append(1))
    base(ids, batch["attention_mask"])
    handle.remove()
    assert seen
    assert len(calls) == 4
    base(ids, batch["attention_mask"])
    assert len(calls) == 4
    with pytest.raises(TypeError, match="multiple values"):
        base(ids, input_ids=ids)
    with pytest.raises(ValueError, match="exactly one"):
        base(attention_mask=batch["attention_mask"])


@torch.no_grad()
def test_embeddings_that_were_replaced_are_read():
    model, batch = int8(), inputs("padded", "bert")
    before = model(**batch).logits
    model.set_input_embeddings(torch.nn.Embedding(64, 36))
    assert relative(model(**batch).logits, before) > 0.1


@pytest.mark.parametrize("width", [20, 36])
@torch.no_grad()
def test_what_lies_between_embeddings_and_layers_is_not_left_out(width, class_forward):
    """ELECTRA's projection, where the embeddings have another width."""
    model = tiny_model("electra", embedding_size=width)
    batch = inputs("padded", "electra")
    exact = model(**batch).logits
    fuse_(model, dtype="int8", calibration=[batch])
    calls = class_forward(model)
    assert encoder_of(model).compiled is not None
    assert relative(model(**batch).logits, exact) < 0.1
    assert bool(calls) == (width == 20)


@torch.no_grad()
def test_a_copy_reads_its_own_embeddings():
    model, batch = int8(), inputs("padded", "bert")
    twin = copy.deepcopy(model)
    expected = model(**batch).logits
    for parameter in model.base_model.embeddings.parameters():
        parameter.zero_()
    assert torch.equal(twin(**batch).logits, expected)


@torch.no_grad()
def test_sizes_that_contradict_each_other_are_refused():
    model = int8()
    ids, native = torch.zeros(2, 5).long(), encoder_of(model).compiled.native
    with pytest.raises(ValueError, match="lengths"):
        native.from_ids(ids, [5, 6])
    with pytest.raises(ValueError, match="types"):
        native.from_ids(ids, [5, 5], ids[:, :4])
    bare = CompiledEncoder(encoder_of(model).layers).native
    with pytest.raises(ValueError, match="no embeddings"):
        bare.from_ids(ids, [5, 5])


@pytest.mark.parametrize(
    "change",
    [
        {"words": torch.zeros(9, 7)},
        {"words": torch.zeros(9, 8).double()},
        {"words": torch.zeros(9, 8, dtype=torch.int8)},
        {"words": torch.zeros(9, 8, dtype=torch.int8), "scale": torch.ones(8)},
        {"positions": torch.zeros(5, 9)},
        {"types": torch.zeros(2, 7)},
        {"types": torch.zeros(8)},
        {"up": (8, 3)},
        {"words": torch.zeros(9, 3), "up": (7, 3)},
    ],
)
def test_tables_that_do_not_fit_are_refused(change):
    level = LEVELS[0]
    tables = {"words": torch.zeros(9, 8), "positions": torch.zeros(5, 8), **change}
    if "up" in change:
        tables["up"] = cpu.linear([cpu.product(level, torch.zeros(change["up"]), None)])
    layer = cpu.module().Layer()
    with pytest.raises(ValueError, match="embeddings"):
        norm = cpu.norm(torch.ones(8), None, 1e-5)
        cpu.Encoder(level, 8, [layer], cpu.Embeddings(norm=norm, **tables))
