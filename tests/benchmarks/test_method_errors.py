"""The errors that docs/concepts/methods.md argues from, against sums over the tokens themselves."""

import pytest
import torch
from torch import nn

from benchmarks.method_errors import errors
from bert_decomp.methods import METHODS
from bert_decomp.statistics import GradientStatistics, InputStatistics, LayerStatistics
from lowrank_kernels import LowRankLinear


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("out_features", "in_features"), [(7, 5), (5, 9)])
def test_errors_are_those_of_the_tokens(method, out_features, in_features):
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features).double()
    x, g = (
        torch.randn(301, in_features).double() @ torch.randn(in_features, in_features).double() + 2,
        torch.randn(301, out_features).double(),
    )
    size = g.square().sum(1)
    share = size / size.sum()
    weighted = (x * share[:, None]).T @ x
    about = LayerStatistics(
        "layer",
        InputStatistics(x.T @ x / len(x), x.mean(0), x.abs().mean(0), len(x)),
        GradientStatistics(g.T @ g / len(g), float(size.mean()), weighted, share @ x),
        torch.rand(in_features).double(),
    )
    down, up, bias = METHODS[method].factor(dense.weight.detach(), dense.bias.detach(), about, 3)
    layer = LowRankLinear(in_features, out_features, 3).double()
    with torch.no_grad():
        for parameter, value in ((layer.down, down), (layer.up, up), (layer.bias, bias)):
            parameter.copy_(value)
        found = errors(dense, layer, about, 2.0)
        moved, y = dense(x) - layer(x), dense(x)
    outputs = about.gradients.relative_second_moment
    assert found["output"] == pytest.approx(
        float(moved.square().sum() / (y - y.mean(0)).square().sum())
    )
    assert found["loss"] == pytest.approx(float(2 * share @ ((moved @ outputs) * moved).sum(1)))
    weight = dense.weight.detach()
    assert found["weight"] == pytest.approx(
        float((weight - up @ down).square().sum() / weight.square().sum())
    )
