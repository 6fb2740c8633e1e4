"""The time split accounts for a whole pass, and knows the part of every linear layer in every family and form."""

import pytest
import torch
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.evaluation.profiling import LINEARS, PARTS, operators_by_part, time_split
from bert_decomp.models.architectures import FAMILIES, encoder_layers
from bert_decomp.runtime import fuse_


def inputs():
    return {name: value for name, value in tiny_batch(9, 17).items() if name != "labels"}


@pytest.mark.parametrize("role", sorted(LINEARS))
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_what_runs_in_a_linear_layer_belongs_to_its_part(family, role):
    model = tiny_model(family)
    layer = next(iter(encoder_layers(model).values())).get_submodule(
        getattr(FAMILIES[family], role)
    )
    # An operator that no model has.
    layer.register_forward_hook(lambda module, args, output: torch.special.i0(output) * 0 + output)
    parts = {
        part
        for name, part, _ in operators_by_part(model, inputs(), 1)
        if name == "aten::special_i0"
    }
    assert parts == {LINEARS[role]}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_the_shares_of_both_forms_sum_to_one_and_the_hooks_are_gone(family):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    for form in (model, fuse_(model)):
        hooks = sum(len(module._forward_hooks) for module in form.modules())
        shares = time_split(form, inputs())
        assert list(shares) == list(PARTS) and sum(shares.values()) == pytest.approx(1)
        assert all(share > 0 for share in shares.values())
        assert sum(len(module._forward_hooks) for module in form.modules()) == hooks
