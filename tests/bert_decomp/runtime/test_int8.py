"""The int8 runtime: exact integer products, logits close to float32 in every family, and what it refuses."""

import copy
import logging

import pytest
import torch
from runtime.forms import partly_low_rank, relative
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.errors import UserError
from bert_decomp.models.int8 import quantised_rows
from bert_decomp.runtime import fuse_, int8, unfuse_
from bert_decomp.runtime.quantised import (
    BALANCES,
    Codes,
    Product,
    channel_balance,
    choose,
    largest_code,
)

POST_NORM = sorted(set(FAMILY_SIZES) - {"modernbert"})


def batches(count=6):
    names = ("input_ids", "attention_mask")
    return [{name: tiny_batch(9, 8 + n)[name] for name in names} for n in range(count)]


@pytest.mark.parametrize("make", [partly_low_rank, tiny_model])
@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_logits_are_close_to_the_float_models(family, make):
    model, batch = make(family), batches()[-1]
    exact = model(**batch).logits
    fuse_(model, dtype="int8", calibration=batches())
    result = model(**batch).logits
    assert 0 < relative(result, exact) < 0.1
    forms = [type(module) for module in model.modules()]
    assert sum(forms.count(form) for form in int8.FORMS.values()) == 9
    assert relative(copy.deepcopy(model)(**batch).logits, result) == 0
    padded = make(family)
    fuse_(padded, unpad=False, dtype="int8", calibration=batches())
    assert 0 < relative(padded(**batch).logits, exact) < 0.1


@torch.no_grad()
def test_quality_is_that_of_the_calibration_batches_and_is_logged(caplog):
    model = partly_low_rank()
    exact = torch.cat([model(**batch).logits for batch in batches()])
    with caplog.at_level(logging.INFO, "bert_decomp"):
        fuse_(model, dtype="int8", calibration=batches())
    result = torch.cat([model(**batch).logits for batch in batches()])
    quality = model.bert.encoder.quality
    assert quality.difference == pytest.approx(relative(result, exact), rel=1e-3)
    same = (result.argmax(-1) == exact.argmax(-1)).double().mean().item()
    assert quality.agreement == pytest.approx(same) and not quality.exact
    assert f"{100 * same:.1f} % of the decisions are the same" in caplog.text


@torch.no_grad()
def test_a_block_whose_error_is_too_large_stays_in_float32(monkeypatch, caplog):
    monkeypatch.setattr(int8, "TOLERANCE", 0.0)
    model, batch = partly_low_rank(), batches()[0]
    fused = fuse_(copy.deepcopy(model))(**batch).logits
    fuse_(model, dtype="int8", calibration=batches())
    # The compiled kernels add up in another order; int8 is a hundred times as far away.
    assert relative(model(**batch).logits, fused) < 1e-5
    assert len(model.bert.encoder.quality.exact) == 10
    assert "2.feed_forward" in caplog.text


@torch.no_grad()
def test_int8_is_taken_apart_and_saved_as_what_it_stands_for():
    model, batch = partly_low_rank(), batches()[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(**batch).logits
    fuse_(model, dtype="int8", calibration=batches())
    assert model.to("cpu") is model
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    unfuse_(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("rows, inside, out", [(1, 3, 5), (7, 33, 17), (64, 129, 31)])
def test_products_are_exact_in_integers(rows, inside, out):
    """Also where every byte has its largest value, which overflows 16 bits if it is too large for the processor."""
    generator = torch.Generator().manual_seed(0)
    source = Codes.between(-1.3, 2.2)
    weight, bias = torch.randn(out, inside, generator=generator), torch.randn(out)
    product = Product(*quantised_rows(weight), bias, source)
    random = torch.randint(0, source.top + 1, (rows, inside), generator=generator).byte()
    for codes in (random, torch.full_like(random, source.top)):
        real = (codes.double() - source.zero) * source.scale
        exact = real @ (product.weight.double() * product.scale.double()[:, None]).t() + bias
        bound = 1e-5 * exact.abs().max()
        assert (product(codes) - exact).abs().max() <= bound
        residual = torch.randn(rows, out)
        wanted = residual.double() + exact
        assert (product.add(codes, residual) - wanted).abs().max() <= 2 * bound
        inner = Codes.between(exact.min().item(), exact.max().item())
        steps = product(codes, inner).double() - (exact / inner.scale + inner.zero)
        assert steps.abs().max() <= 0.5 + 1e-3
        positive = product(codes, inner, "relu")
        assert positive.max() <= inner.top and positive.min() >= inner.zero


def test_codes_round_to_the_nearest_and_hold_zero_exactly():
    codes = Codes.between(-0.7, 3.1)
    x = torch.linspace(-0.7, 3.1, 1001)
    assert codes.top == largest_code()
    assert (codes.rounded(x) - x).abs().max() <= codes.scale * 0.501
    assert codes.rounded(torch.zeros(1)).item() == 0
    encoded = codes.encode(torch.cat([x, torch.tensor([-1e9, 1e9])]).view(17, 59))
    assert encoded.dtype == torch.uint8 and encoded.max() == codes.top and encoded.min() == 0
    decoded = (encoded.flatten()[:-2].float() - codes.zero) * codes.scale
    assert torch.allclose(decoded, codes.rounded(x), atol=1e-6)


def test_balance_changes_no_product_and_helps_where_channels_differ():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(200, 20, generator=generator), torch.randn(9, 20, generator=generator)
    x[:, 3] *= 50
    weight[:, 5], x[:, 7] = 0, 0
    for exponent in BALANCES:
        balance = channel_balance(x, weight, exponent)
        assert torch.allclose((x * balance) @ (weight / balance).t(), x @ weight.t(), atol=1e-3)

    def error(exponents):
        limits, balance = choose(x, weight, exponents)
        codes = Codes.between(*limits.tolist())
        return ((codes.rounded(x * balance) / balance - x) @ weight.t()).norm()

    assert error(BALANCES) < 0.5 * error((0.0,))


def test_what_cannot_be_int8_is_refused_in_one_line():
    with pytest.raises(UserError, match="int8 needs calibration"):
        fuse_(partly_low_rank(), dtype="int8")
    with pytest.raises(UserError, match="int8 needs calibration"):
        fuse_(partly_low_rank(), dtype="int8", calibration=[])
    with pytest.raises(UserError, match="it must be 'int8' or None"):
        fuse_(partly_low_rank(), dtype="int4", calibration=batches())
    with pytest.raises(UserError, match="float32 model on the CPU"):
        fuse_(partly_low_rank().bfloat16(), dtype="int8", calibration=batches())
    with pytest.raises(UserError, match="int8 is not for modernbert"):
        fuse_(tiny_model("modernbert"), dtype="int8", calibration=batches())
    model = fuse_(partly_low_rank(), dtype="int8", calibration=batches())
    with pytest.raises(UserError, match="cannot be moved or cast"):
        model.double()
    with pytest.raises(RuntimeError, match="takes no other weights"):
        model.load_state_dict(partly_low_rank().state_dict())
