"""The compiled encoder equals what it stands for: float blocks up to rounding, int8 blocks up to a few codes."""

import copy
from functools import partial

import pytest
import torch
from runtime.forms import encoder_of, partly_low_rank, relative
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.runtime import fuse_, quantised
from bert_decomp.runtime.compiled import CompiledEncoder
from lowrank_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.levels(), reason=str(cpu.why_not()))
LEVELS = cpu.levels() or ("none",)
POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert"})


def dense():
    return tiny_model("bert")


def inputs(batch, length):
    return {name: tiny_batch(batch, length)[name] for name in ("input_ids", "attention_mask")}


def compile_(model, level):
    encoder = encoder_of(model)
    encoder.compiled = CompiledEncoder(encoder.layers, level)
    return model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_float_blocks_give_the_models_own_numbers(family, level):
    model = partly_low_rank(family)
    batches = [inputs(9, 11), inputs(1, 7), inputs(2, 2)]
    exact = [copy.deepcopy(model).double()(**batch).logits for batch in batches]
    compile_(fuse_(model), level)
    for batch, expected in zip(batches, exact, strict=True):
        assert relative(model(**batch).logits, expected) < 2e-5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [partly_low_rank, dense])
@torch.no_grad()
def test_all_tokens_of_long_sentences(make, level):
    """More rows than a block has, and no first token is singled out."""
    model = make().base_model
    batch = {"input_ids": torch.randint(5, 50, (3, 40)), "attention_mask": torch.ones(3, 40).long()}
    batch["attention_mask"][1, 17:] = 0
    exact = copy.deepcopy(model).double()(**batch).last_hidden_state
    compile_(fuse_(model), level)
    mask = batch["attention_mask"].bool()
    result = model(**batch).last_hidden_state
    assert relative(result[mask], exact[mask]) < 2e-5
    assert (result[~mask] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_int8_blocks_give_the_numbers_of_the_library(monkeypatch, level):
    monkeypatch.setattr(quantised, "largest_code", partial(cpu.largest_code, level))
    batches = [inputs(9, 8 + n) for n in range(6)]
    for make in (partly_low_rank, dense):
        model = fuse_(make(), dtype="int8", calibration=batches)
        encoder = encoder_of(model)
        compile_(model, level)
        compiled = [model(**batch).logits for batch in batches]
        encoder.compiled = None
        library = [model(**batch).logits for batch in batches]
        # Values between two codes may take either, as the order of a sum decides.
        assert relative(torch.cat(compiled), torch.cat(library)) < 0.02


@torch.no_grad()
def test_threads_do_not_change_a_bit():
    """Of the encoder: torch's own products behind it may."""
    model, batch = partly_low_rank(), inputs(9, 13)
    fuse_(model, dtype="int8", calibration=[batch])
    encoder = encoder_of(model)
    hidden, mask = torch.randn(9, 13, 36), batch["attention_mask"]
    before = torch.get_num_threads()
    try:
        results, single = [], []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            # Many sentences, and one whose rows are shared out.
            results += [encoder(hidden, mask).last_hidden_state for _ in range(5)]
            single += [encoder(hidden[:1]).last_hidden_state for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, same[0]) for same in (results, single) for one in same)


@torch.no_grad()
def test_a_batch_of_many_rows_goes_through_in_parts():
    model = partly_low_rank()
    fuse_(model, dtype="int8", calibration=[inputs(9, 13)])
    encoder, hidden = encoder_of(model).compiled.native, torch.randn(150, 39, 36)
    lengths = [n % 39 + 1 for n in range(150)]
    result, first = encoder(hidden, lengths), encoder(hidden, lengths, first_only=True)
    assert torch.equal(first, result[:, :1])
    for n in (0, 75, 149):
        assert torch.equal(encoder(hidden[n : n + 1], lengths[n : n + 1])[0], result[n])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(hidden.double(), lengths), result)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [[3, 99], [3], [3, -1]])
def test_lengths_that_do_not_fit_are_refused(wrong):
    model = partly_low_rank()
    fuse_(model, dtype="int8", calibration=[inputs(9, 13)])
    with pytest.raises(ValueError, match="lengths"):
        encoder_of(model).compiled.native(torch.randn(2, 9, 36), wrong)


@torch.no_grad()
def test_it_is_chosen_for_int8_and_copied_with_the_model():
    model, batch = partly_low_rank(), inputs(4, 9)
    fuse_(model, dtype="int8", calibration=[batch])
    assert encoder_of(model).compiled is not None
    twin = copy.deepcopy(model)
    assert encoder_of(twin).compiled.layers[0] is encoder_of(twin).layers[0]
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_blocks_without_a_kernel_go_to_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "levels", lambda: ())
    model, batch = partly_low_rank(), inputs(4, 9)
    fuse_(model, dtype="int8", calibration=[batch])
    assert encoder_of(model).compiled is None
    assert torch.isfinite(model(**batch).logits).all()
