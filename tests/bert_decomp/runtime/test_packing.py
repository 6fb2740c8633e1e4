"""The inference form works on real tokens alone: how they are packed, and who still gets every token."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runtime.forms import assert_close, inputs, low_rank
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.runtime import fuse_, unfuse_
from bert_decomp.runtime.encoder import FusedEncoder
from bert_decomp.runtime.sequences import pack
from lowrank_kernels.reference import attention


@pytest.mark.parametrize("unpad", [True, False])
@torch.no_grad()
def test_the_variable_length_kernel_is_told_where_sentences_begin(monkeypatch, unpad):
    """The kernel itself needs a GPU; one that does by hand what it documents must give the same logits."""
    calls = []

    def by_hand(query, key, value, query_bounds, key_bounds, longest_query, longest_key):
        calls.append(len(query))
        assert query_bounds.dtype == key_bounds.dtype == torch.int32
        assert len(query_bounds) == len(key_bounds)
        assert query_bounds[-1] == len(query) and key_bounds[-1] == len(key)
        assert int(query_bounds.diff().max()) == longest_query
        assert int(key_bounds.diff().max()) <= longest_key
        parts = []
        for index in range(len(query_bounds) - 1):
            asking, told = (
                slice(*query_bounds[index : index + 2].tolist()),
                slice(*key_bounds[index : index + 2].tolist()),
            )
            if query_bounds[index] == query_bounds[index + 1]:
                continue
            q, k, v = (x.transpose(0, 1) for x in (query[asking], key[told], value[told]))
            parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        return torch.cat(parts)

    model, batch = low_rank().bfloat16(), inputs("right", "bert")
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    fuse_(model, unpad=unpad)
    encoder = next(module for module in model.modules() if isinstance(module, FusedEncoder))
    encoder.prefix = True
    monkeypatch.setattr(attention, "varlen_of", lambda device: by_hand)
    assert_close(model(**batch).logits, unfused, exact)
    tokens = int(batch["attention_mask"].sum()) if unpad else batch["input_ids"].numel()
    assert calls == [tokens, tokens, len(batch["input_ids"])]


class Waits(TorchDispatchMode):
    """Notes the operators whose result's shape or value the host must wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        interleaved = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        waiting = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique_consecutive",
            "_unique2",
        )
        if name in waiting or by_mask or interleaved:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_packing_waits_for_the_device_once(monkeypatch):
    """Three numbers in one transfer, and nothing else whose shape depends on the values, but what groups ask for."""
    keep, lists = inputs("right", "bert")["attention_mask"].bool(), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.shape) or tolist(t))
    with Waits() as waits:
        packed = pack(keep)
        rows = packed.rows(torch.randn(*keep.shape, 3))
        packed.batch(rows)
    assert lists == [(3,)] and not waits.seen
    assert len(rows) == keep.sum() and packed.longest == keep.sum(1).max()
    assert packed.groups == sorted(packed.groups)
    assert sum(length * count for length, count in packed.groups) == len(rows)
    with Waits() as waits:
        keep[keep], keep.nonzero()
    assert waits.seen == ["index", "nonzero"]
    keep[0, 0] = False
    assert pack(keep) is None and pack(keep[:0]) is None


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForTokenClassification])
@torch.no_grad()
def test_models_that_read_every_token_get_every_token(kind):
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model("bert", **FAMILY_SIZES["bert"])).eval()
    decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    batch = inputs("right", "bert")
    real = batch["attention_mask"].bool()
    unfused, exact = model(**batch)[0][real], copy.deepcopy(model).double()(**batch)[0][real]
    assert_close(fuse_(model)(**batch)[0][real], unfused, exact)


@torch.no_grad()
def test_padding_costs_nothing():
    """Rows that leave the first layer are the real tokens, the last layer's the sentences."""
    model, batch = fuse_(low_rank()), inputs("right", "bert")
    encoder = next(module for module in model.modules() if isinstance(module, FusedEncoder))
    rows = []
    for layer in (encoder.layers[0], encoder.layers[-1]):
        layer.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model(**batch)
    assert rows == [int(batch["attention_mask"].sum()), len(batch["input_ids"])]


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "electra"])
def test_the_base_model_of_a_fused_classifier_gives_every_token(family):
    model = low_rank(family)
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    real = batch["attention_mask"].bool()
    wanted, logits = model.base_model(**batch).last_hidden_state[real], model(**batch).logits
    fused = fuse_(copy.deepcopy(model))
    for form in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for call in (form.base_model, form.base_model.forward):
            found = call(**batch).last_hidden_state
            torch.testing.assert_close(found[real], wanted, rtol=1e-4, atol=1e-5)
        for call in (form, form.forward):
            torch.testing.assert_close(call(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert inspect.signature(fused.forward) == inspect.signature(model.forward)
    # A classifier in the middle of its pass, in another thread, changes nothing here.
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(fused if i % 2 else fused.base_model, **batch) for i in range(40)]
    for index, call in enumerate(calls):
        found = call.result()
        result = found.logits if index % 2 else found.last_hidden_state[real]
        torch.testing.assert_close(result, logits if index % 2 else wanted, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(unfuse_(fused))


@torch.no_grad()
def test_a_classifier_computes_its_last_layer_for_first_tokens_alone():
    model, batch = fuse_(tiny_model("bert")), tiny_batch()
    rows = []
    last = model.bert.encoder.layers[-1].feed_forward
    last.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(**batch), model.base_model(batch["input_ids"], batch["attention_mask"])
    assert rows == [len(batch["labels"]), int(batch["attention_mask"].sum())]
