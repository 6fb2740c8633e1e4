"""CUDA graphs by shape bucket, without a GPU: a recorder that does a call again on the recorded tensors."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForTokenClassification

from bert_decomp.errors import UserError
from bert_decomp.runtime import fuse_, unfuse_
from bert_decomp.runtime.encoder import FusedEncoder
from bert_decomp.runtime.graphs import (
    AUTOMATIC,
    FEW_TOKENS,
    LEAST_FILLED,
    check_buckets,
    choose_bucket,
    graph_,
)

POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert"})
BUCKETS = [(1, 8), (4, 8), (7, 16)]


class Recorder:
    """Notes the shapes that it records and replays; a replay computes from what the recorded tensors hold by then."""

    def __init__(self):
        self.recorded, self.replayed = [], []

    def record(self, call):
        shape = call().logits.shape if "logits" in call() else None
        self.recorded.append(shape)

        def replay():
            self.replayed.append(shape)
            return call()

        return replay

    @contextlib.contextmanager
    def in_order(self):
        yield

    def ask(self, flag):
        return lambda: bool(flag)


def graphed(model, buckets=BUCKETS):
    recorder = Recorder()
    encoder = next(module for module in model.modules() if isinstance(module, FusedEncoder))
    graph_(model, encoder, buckets, recorder)
    return recorder


def inputs(rows, length):
    batch = tiny_batch(rows, length)
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_results_are_those_without_graphs(family):
    """Batches of every fit: exact, padded, without a mask, after a larger one in the bucket; gaps go without graphs."""
    model = fuse_(tiny_model(family))
    plain, recorder = copy.deepcopy(model), graphed(model)
    assert [shape[0] for shape in recorder.recorded] == [7, 4, 1]
    gaps = inputs(3, 7)
    gaps["attention_mask"][1, :4] = torch.tensor([1, 0, 0, 1])
    without = {"input_ids": torch.randint(5, 30, (2, 6))}
    for batch in (inputs(4, 8), inputs(3, 5), inputs(1, 8), inputs(5, 13), gaps, without):
        torch.testing.assert_close(
            model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5
        )
    # Whether there is a gap is known only when the replay is under way.
    assert [shape[0] for shape in recorder.replayed] == [4, 4, 1, 7, 4, 4]


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
@torch.no_grad()
def test_padding_is_cut_off_results_that_follow_the_length(kind):
    torch.manual_seed(0)
    # As many labels as a bucket has tokens: which dimension is which cannot be told from one shape.
    labels = 2 if kind is AutoModelForQuestionAnswering else 8
    config = AutoConfig.for_model("bert", **{**FAMILY_SIZES["bert"], "num_labels": labels})
    model = fuse_(kind.from_config(config).eval())
    plain, recorder = copy.deepcopy(model), Recorder()
    encoder = next(module for module in model.modules() if isinstance(module, FusedEncoder))
    graph_(model, encoder, [(4, 8)], recorder)
    batch = inputs(3, 5)
    real = batch["attention_mask"].bool()
    for mine, right in zip(model(**batch).values(), plain(**batch).values(), strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine[real], right[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_results_are_not_overwritten_by_the_next_call():
    model = fuse_(tiny_model("bert"))
    graphed(model)
    first = model(**inputs(4, 8)).logits
    kept = first.clone()
    model(input_ids=torch.full((4, 8), 9))
    assert torch.equal(first, kept)


def test_what_no_graph_can_do_runs_as_without():
    """Too large, gradients wanted, labels, embeddings for ids, another shape of mask, no tokens at all."""
    model = fuse_(tiny_model("bert"))
    recorder, batch = graphed(model), inputs(2, 6)
    model(**batch)
    with torch.no_grad():
        model(**inputs(8, 9))
        model(**batch, labels=torch.zeros(2, dtype=torch.long))
        model(inputs_embeds=torch.randn(2, 6, model.config.hidden_size))
        with pytest.raises(UserError, match="keeps no"):
            model(**batch, output_hidden_states=True)
        with pytest.raises(UserError, match="needs \\(batch, length\\)"):
            model(batch["input_ids"], attention_mask=torch.ones(2, 1, 6, 6))
        assert not recorder.replayed
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(recorder.replayed) == 1


@torch.no_grad()
def test_a_model_that_changed_drops_its_graphs_and_a_copy_has_none():
    model, batch = fuse_(tiny_model("bert")), inputs(2, 6)
    recorder = graphed(model)
    right = model(**batch).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**batch).logits, right)
    assert len(recorder.replayed) == 1
    for change in (lambda: model.double(), lambda: model.load_state_dict(model.state_dict())):
        recorder = graphed(model)
        change()
        with pytest.warns(UserWarning, match="CUDA graphs are dropped"):
            torch.testing.assert_close(model(**batch).logits.float(), right)
        assert not recorder.replayed
    unfuse_(model.float())
    torch.testing.assert_close(model(**batch).logits, right)
    assert "forward" not in vars(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_graphs_on_a_gpu():
    model = tiny_model("bert").to("cuda")
    batches = [{n: v.to("cuda") for n, v in inputs(*shape).items()} for shape in ((4, 8), (3, 5))]
    right = [model(**batch).logits for batch in batches]
    fuse_(model, graphs=BUCKETS)
    for _ in range(2):
        for batch, logits in zip(batches, right, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-3, atol=1e-4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    buckets=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), max_size=6),
    rows=st.integers(0, 70),
    length=st.integers(0, 520),
)
def test_the_bucket_is_the_smallest_that_fits_and_not_mostly_padding(buckets, rows, length):
    chosen = choose_bucket(buckets, rows, length)
    fitting = [b * n for b, n in buckets if rows <= b and length <= n and rows and length]
    if chosen is None:
        smallest = min(fitting, default=None)
        assert smallest is None or (
            smallest > FEW_TOKENS and rows * length < LEAST_FILLED * smallest
        )
    else:
        assert rows <= chosen[0] and length <= chosen[1]
        assert chosen[0] * chosen[1] == min(fitting)


def test_what_cannot_be_asked_for_is_said(monkeypatch):
    model = tiny_model("bert")
    with pytest.raises(UserError, match="CUDA graphs need a GPU, and the model is on cpu"):
        fuse_(model, graphs="auto")
    for wrong in ("all", [(1,)], [(0, 4)], ["ab"], [(1, 2.0)]):
        with pytest.raises(UserError, match="it must be 'auto' or pairs"):
            fuse_(model, graphs=wrong)
    with pytest.raises(UserError, match="the model takes 40 tokens"):
        fuse_(model, graphs=[(1, 41)])
    with pytest.raises(UserError, match="no inference form that graphs could replay"):
        fuse_(tiny_model("modernbert"), graphs="auto")
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    assert check_buckets(model, [(8, 8), (1, 8), (8, 8)]) == [(1, 8), (8, 8)]
    assert check_buckets(model, "auto") == [pair for pair in sorted(AUTOMATIC) if pair[1] <= 40]
