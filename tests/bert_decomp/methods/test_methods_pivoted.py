"""The pivoted encoding: the same function in fewer numbers."""

import pytest
import torch

from bert_decomp.methods.pivoted import PivotedLinear, pivoted_rank
from lowrank_kernels import LowRankLinear


@pytest.mark.parametrize(
    "out_features,in_features,rank", [(13, 9, 4), (9, 13, 4), (31, 31, 17), (8, 5, 5), (5, 8, 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_pivoting_loses_nothing_and_saves_the_rank_squared(out_features, in_features, rank, bias):
    layer = LowRankLinear(in_features, out_features, rank, bias=bias, dtype=torch.float64)
    pivoted, x = (
        PivotedLinear.from_low_rank(layer),
        torch.randn(3, 7, in_features, dtype=torch.float64),
    )
    torch.testing.assert_close(pivoted(x), layer(x), rtol=1e-9, atol=1e-9)
    assert (
        sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in pivoted.parameters())
        == rank * rank
    )


@pytest.mark.parametrize(
    "out_features,in_features,rank", [(768, 768, 245), (768, 3072, 100), (13, 9, 3), (9, 13, 1)]
)
def test_the_pivoted_rank_is_the_largest_of_no_greater_size(out_features, in_features, rank):
    found, total = pivoted_rank(out_features, in_features, rank), out_features + in_features
    assert found * total - found * found <= rank * total
    assert (
        found == min(out_features, in_features)
        or (found + 1) * total - (found + 1) ** 2 > rank * total
    )


def test_the_published_example():
    assert pivoted_rank(768, 768, 245) == 305
