"""The inference form: logits of the unfused model for every family, mask and mix of layers, and its refusals."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from bert_decomp import runtime
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.runtime import fuse_, unfuse_
from bert_decomp.runtime.blocks import QueryKeyValue
from bert_decomp.runtime.encoder import FusedEncoder
from bert_decomp.runtime.sequences import pack
from lowrank_kernels import LowRankLinear, dispatch, use_backend
from lowrank_kernels.reference import attention

POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert"})


def low_rank(family="bert", rank=7, **options):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=rank, **options), progress=False)
    return model


def assert_close(fused, unfused, exact):
    """At most twice as far from float64 as the unfused form, plus a few roundings of the result."""
    bound = (
        2 * (unfused - exact).abs().max() + 4 * torch.finfo(unfused.dtype).eps * exact.abs().max()
    )
    assert (fused - exact).abs().max() <= bound


def inputs(kind, family):
    batch = {name: value for name, value in tiny_batch(7, 13).items() if name != "labels"}
    mask = batch["attention_mask"]
    if kind == "no mask":
        return {"input_ids": batch["input_ids"]}
    if kind == "no padding":
        mask.fill_(1)
    elif kind == "left":
        batch["attention_mask"] = mask.flip(1)
    elif kind == "gaps":
        mask[1, :9] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1])
    elif kind == "one sentence":
        return {name: value[1:2] for name, value in batch.items()}
    elif kind == "single tokens":
        return {name: value[:, :1] for name, value in batch.items()}
    return batch


@pytest.mark.parametrize(
    "kind", ["right", "left", "gaps", "no padding", "no mask", "one sentence", "single tokens"]
)
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
@torch.no_grad()
def test_logits_are_the_unfused_models(family, kind):
    model, batch = low_rank(family), inputs(kind, family)
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    for unpad in (True, False):
        assert_close(fuse_(copy.deepcopy(model), unpad=unpad)(**batch).logits, unfused, exact)


@pytest.mark.parametrize("kind", ["right", "gaps", "one sentence"])
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
@torch.no_grad()
def test_a_dense_model_has_the_same_inference_form(family, kind):
    model, batch = tiny_model(family), inputs(kind, family)
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    assert_close(fuse_(model)(**batch).logits, unfused, exact)
    assert torch.equal(unfuse_(model)(**batch).logits, unfused)


@pytest.mark.parametrize("make", [low_rank, tiny_model])
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
@torch.no_grad()
def test_half_precision(family, make):
    model, batch = make(family).bfloat16(), inputs("right", family)
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    for unpad in (True, False):
        assert_close(fuse_(copy.deepcopy(model), unpad=unpad)(**batch).logits, unfused, exact)


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


@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_layers_left_dense_and_unequal_ranks(family):
    model, batch = tiny_model(family), inputs("right", family)
    decompose_(
        model,
        DecompositionConfig("svd", encoder_fraction=0.7, allocation="uniform", exclude=["*.1.*"]),
        progress=False,
    )
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    assert_close(fuse_(model)(**batch).logits, unfused, exact)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
@torch.no_grad()
def test_fused_operators_serve_the_model(family, monkeypatch):
    """With Triton asked for, each half of a layer is one operator; ModernBERT keeps one operator a matrix."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = low_rank(family).to(device)
    batch = {name: value.to(device) for name, value in inputs("right", family).items()}
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    fuse_(model)
    served, choose = [], dispatch.choose
    monkeypatch.setattr(
        dispatch,
        "choose",
        lambda backend, problem, *rest: (
            served.append(problem.operator) or choose(backend, problem, *rest)
        ),
    )
    with use_backend("triton"):
        assert_close(model(**batch).logits, unfused, exact)
    # MPNet adds a bias to its scores.
    attention = [] if family == "mpnet" else ["attention"]
    whole = ["qkv", *attention, "linear", "norm", "ffn", "norm"]
    layer = ["linear"] * 4 if family == "modernbert" else whole
    # The last layer's query is of fewer rows than its key and value.
    last = layer if family == "modernbert" else ["linear"] * 3 + layer[1:]
    assert served == layer * 2 + last


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
@torch.no_grad()
def test_every_problem_of_a_forward_pass_is_calibrated(family, monkeypatch):
    """What the dispatcher is asked for in a forward pass is what ``fuse_`` handed to calibration, up to the rows."""
    model, handed, asked, choose = low_rank(family), [], set(), dispatch.choose
    monkeypatch.setattr(runtime, "calibrate", lambda problems, device: handed.extend(problems))
    fuse_(model)

    def noting(backend, problem, *rest):
        asked.add(problem._replace(rows=0))
        return choose(backend, problem, *rest)

    monkeypatch.setattr(dispatch, "choose", noting)
    with use_backend("dense"):
        model(**inputs("right", family))
    assert asked == set(handed)


@torch.no_grad()
def test_merged_weights_follow_what_is_loaded():
    model, other, batch = fuse_(low_rank()), low_rank(), inputs("right", "bert")
    for parameter in other.parameters():
        parameter.mul_(1.1)
    with use_backend("dense"):
        model(**batch)
        model.load_state_dict(other.state_dict())
        exact = copy.deepcopy(other).double()(**batch).logits
        assert_close(model(**batch).logits, other(**batch).logits, exact)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
@torch.no_grad()
def test_a_fused_model_is_saved_copied_cast_and_taken_apart_as_what_it_stands_for(family, tmp_path):
    model, batch = low_rank(family), inputs("right", family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names, before = [name for name, _ in model.named_modules()], model(**batch).logits
    fuse_(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    twin.double()
    assert torch.allclose(twin(**batch).logits.float(), before, atol=1e-4)
    unfuse_(twin)
    assert all(
        parameter.dtype == torch.float64 and parameter.is_contiguous()
        for parameter in twin.parameters()
    )
    for form in (twin.float(), unfuse_(model)):
        assert [name for name, _ in form.named_modules()] == names
        assert torch.equal(form(**batch).logits, before)
        assert form(**batch, output_hidden_states=True).hidden_states is not None
    fuse_(model)


@torch.no_grad()
def test_aligned_factors_take_no_second_copy_of_the_memory():
    model = fuse_(low_rank(rank=16))
    aligned = next(module for module in model.modules() if type(module).__name__ == "AlignedLinear")
    assert (
        aligned.source.down.untyped_storage().data_ptr()
        == aligned.down.untyped_storage().data_ptr()
    )
    assert aligned.source.up.untyped_storage().data_ptr() == aligned.up.untyped_storage().data_ptr()


def test_fusing_twice_or_a_model_without_anything_to_fuse_is_refused():
    with pytest.raises(UserError, match="no factored layer; decompose it first"):
        fuse_(tiny_model("modernbert", hidden_activation="relu"))
    for model in (low_rank(), tiny_model("bert")):
        fuse_(model)
        with pytest.raises(UserError, match="fused already"):
            fuse_(model)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_the_inference_form_cannot_do_is_refused_in_one_line(family):
    model, batch = fuse_(low_rank(family)), inputs("right", family)
    with pytest.raises(UserError, match="unfuse_ it first"):
        model.train()
    for question in ("output_hidden_states", "output_attentions"):
        with pytest.raises(UserError, match="keeps no"):
            model(**batch, **{question: True})
    with pytest.raises(UserError, match="needs \\(batch, length\\)"):
        model(batch["input_ids"], attention_mask=torch.ones(7, 1, 13, 13))
    longest = 40 if family == "bert" else 38
    model(torch.full((1, longest), 9))
    with pytest.raises(UserError, match=f"{longest + 1} tokens long and the model takes {longest}"):
        model(torch.full((1, longest + 1), 9))


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_serves_every_batch_and_length():
    """torch.compile sees the whole fused model, once, whatever the shape; padding stays, for its amount is unknown."""
    model = fuse_(low_rank("mpnet"))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows, length in ((5, 11), (3, 7), (6, 13)):
        batch = {
            name: value for name, value in tiny_batch(rows, length).items() if name != "labels"
        }
        assert torch.allclose(compiled(**batch).logits, model(**batch).logits, atol=1e-5)
    assert len(graphs) == 1


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


@torch.no_grad()
def test_dense_query_key_and_value_in_one_product_are_the_model_as_before():
    """On a CPU the product has to be asked for. Copies, loaded weights and the state dict are the layers' own."""
    model, batch = tiny_model("bert"), inputs("right", "bert")
    unfused, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = [m for m in fuse_(model).modules() if isinstance(m, QueryKeyValue)]
    for step in steps:
        step.stack(everywhere=True)
    assert steps and all(step._stacked is not None for step in steps)
    assert_close(model(**batch).logits, unfused, exact)
    assert_close(copy.deepcopy(model)(**batch).logits, unfused, exact)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    model.load_state_dict({name: 1.1 * value for name, value in before.items()})
    other = tiny_model("bert")
    other.load_state_dict({name: 1.1 * value for name, value in before.items()})
    exact = copy.deepcopy(other).double()(**batch).logits
    assert_close(model(**batch).logits, other(**batch).logits, exact)
    unfuse_(model)
    assert_close(model(**batch).logits, other(**batch).logits, exact)
    parameters = list(model.parameters())
    assert all(p.nbytes == p.untyped_storage().nbytes() for p in parameters)
