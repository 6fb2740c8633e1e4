"""The inference form: logits of the unfused model for every family, mask and mix of layers, and its refusals."""

import copy

import pytest
import torch
from runtime.forms import assert_close, inputs, low_rank
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp import runtime
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.runtime import fuse_, unfuse_
from bert_decomp.runtime.blocks import QueryKeyValue
from lowrank_kernels import LowRankLinear, dispatch, use_backend

POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert"})


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
