"""Every decomposition method against the closed forms that it must satisfy, in float64."""

import pytest
import torch

from bert_decomp.methods import METHODS, Drift, Metric, balanced, solve
from bert_decomp.statistics import GradientStatistics, InputStatistics, LayerStatistics

whiten_factor = METHODS["whiten"].factor
SHAPES = [(7, 7), (13, 5), (5, 13), (31, 17)]


def problem(out_features, in_features, tokens=400, seed=0):
    """A weight, a bias and inputs with a mean and very unequal directions, and their statistics."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight, bias = draw(out_features, in_features), draw(out_features)
    x = draw(tokens, in_features) @ (
        draw(in_features, in_features) * torch.logspace(0, -2, in_features)
    ) + draw(in_features)
    g = draw(tokens, out_features) @ draw(out_features, out_features) * draw(tokens, 1)
    return weight, bias, x, layer_statistics(x, g)


def layer_statistics(x, g):
    tokens, weight = len(x), g.square().sum(1, keepdim=True)
    gradients = GradientStatistics(
        g.T @ g / tokens,
        float(weight.mean()),
        (x * weight).T @ x / weight.sum(),
        (x * weight).sum(0) / weight.sum(),
    )
    return LayerStatistics(
        "layer.0.output.dense",
        InputStatistics(x.T @ x / tokens, x.mean(0), x.abs().mean(0), tokens),
        gradients,
        (g.T @ x).square().sum(0),
    )


def output_error(weight, bias, x, down, up, new_bias):
    return ((x @ weight.T + bias) - (x @ down.T @ up.T + new_bias)).square().sum(1).mean()


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("out_features,in_features", SHAPES)
def test_full_rank_is_the_dense_layer(name, out_features, in_features):
    weight, bias, x, statistics = problem(out_features, in_features)
    down, up, new_bias = METHODS[name].factor(weight, bias, statistics, min(weight.shape))
    torch.testing.assert_close(
        x @ down.T @ up.T + new_bias, x @ weight.T + bias, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("out_features,in_features", SHAPES)
def test_shapes_and_falling_spectrum(name, out_features, in_features):
    weight, bias, _, statistics = problem(out_features, in_features)
    down, up, new_bias = METHODS[name].factor(weight, bias, statistics, 3)
    assert (
        down.shape == (3, in_features)
        and up.shape == (out_features, 3)
        and new_bias.shape == (out_features,)
    )
    values = METHODS[name].spectrum(weight, statistics)
    assert (
        values.shape == (min(weight.shape),)
        and (values[1:] <= values[:-1] + 1e-12).all()
        and (values >= 0).all()
    )


@pytest.mark.parametrize("out_features,in_features", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_svd_loses_exactly_the_dropped_energy(out_features, in_features, rank):
    weight, bias, _, _ = problem(out_features, in_features)
    down, up, _ = METHODS["svd"].factor(weight, bias, None, rank)
    dropped = METHODS["svd"].spectrum(weight, None)[rank:].square().sum()
    torch.testing.assert_close((weight - up @ down).square().sum(), dropped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("out_features,in_features", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_whiten_loses_exactly_the_dropped_energy_of_its_outputs(out_features, in_features, rank):
    weight, bias, x, statistics = problem(out_features, in_features)
    error = output_error(weight, bias, x, *METHODS["whiten"].factor(weight, bias, statistics, rank))
    dropped = METHODS["whiten"].spectrum(weight, statistics)[rank:].square().sum()
    # The ridge of one millionth of the mean variance is all that separates the two.
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=1e-6 * float(weight.square().sum()))


@pytest.mark.parametrize("out_features,in_features", SHAPES)
def test_whiten_equals_its_cholesky_form(out_features, in_features):
    """svd(W L) L^-1 with L L^T the covariance, the form that DRONE and SVD-LLM state."""
    weight, bias, _, statistics = problem(out_features, in_features)
    factor = torch.linalg.cholesky(statistics.inputs.covariance)
    u, s, vt = torch.linalg.svd(weight @ factor, full_matrices=False)
    stated = (u[:, :3] * s[:3]) @ torch.linalg.solve_triangular(
        factor, vt[:3], upper=False, left=False
    )
    down, up, _ = whiten_factor(weight, bias, statistics, 3)
    torch.testing.assert_close((up @ down) @ factor, stated @ factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out_features,in_features", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_centred_is_never_worse_than_uncentred_nor_than_svd(out_features, in_features, rank):
    weight, bias, x, statistics = problem(out_features, in_features)
    centred = output_error(weight, bias, x, *whiten_factor(weight, bias, statistics, rank))
    vectors = torch.linalg.eigh(weight @ statistics.inputs.second_moment @ weight.T).eigenvectors[
        :, -rank:
    ]
    uncentred = output_error(weight, bias, x, vectors.T @ weight, vectors, bias)
    plain = output_error(weight, bias, x, *METHODS["svd"].factor(weight, bias, None, rank))
    assert centred <= uncentred * (1 + 1e-5) and centred <= plain * (1 + 1e-5)


@pytest.mark.parametrize("out_features,in_features", SHAPES)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_survive_statistics_of_less_than_the_width(name, out_features, in_features):
    weight, bias, _, statistics = problem(out_features, in_features, tokens=3)
    for rank in (1, min(weight.shape)):
        down, up, new_bias = METHODS[name].factor(weight, bias, statistics, rank)
        assert all(torch.isfinite(tensor).all() for tensor in (down, up, new_bias))
    torch.testing.assert_close(up @ down, weight, rtol=1e-7, atol=1e-7)


def test_whiten_makes_the_bias_that_a_layer_lacks():
    weight, _, x, statistics = problem(6, 9)
    down, up, bias = whiten_factor(weight, None, statistics, 2)
    torch.testing.assert_close(
        (x @ down.T @ up.T + bias).mean(0), (x @ weight.T).mean(0), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("out_features,in_features", SHAPES)
def test_the_two_sided_solution_equals_the_stated_one_and_loses_the_dropped_energy(
    out_features, in_features
):
    """svd(L_G^T W L_S), up = L_G^-T U s, down = V^T L_S^-1, whichever side of the weight is the smaller."""
    weight, _, _, statistics = problem(out_features, in_features)
    s, g = statistics.inputs.covariance, statistics.gradients.second_moment
    values, up, down = solve(weight, Metric(s, g), 3)
    factor_s, factor_g = torch.linalg.cholesky(s), torch.linalg.cholesky(g)
    u, sigma, vt = torch.linalg.svd(factor_g.T @ weight @ factor_s, full_matrices=False)
    torch.testing.assert_close(values, sigma, rtol=1e-6, atol=1e-6 * float(sigma[0]))
    torch.testing.assert_close(
        factor_g.T @ up @ down @ factor_s,
        (u[:, :3] * sigma[:3]) @ vt[:3],
        rtol=1e-6,
        atol=1e-6 * float(sigma[0]),
    )
    error = weight - up @ down
    torch.testing.assert_close(
        torch.trace(g @ error @ s @ error.T), sigma[3:].square().sum(), rtol=1e-6, atol=1e-9
    )


def test_balancing_equalises_norms_and_keeps_the_product_even_with_zeros():
    down, up = torch.randn(4, 9, dtype=torch.float64) * 100, torch.randn(5, 4, dtype=torch.float64)
    down[2] = 0
    even_down, even_up = balanced(down, up)
    torch.testing.assert_close(even_up @ even_down, up @ down)
    keep = [0, 1, 3]
    torch.testing.assert_close(even_down.norm(dim=1)[keep], even_up.norm(dim=0)[keep])


ANCHORED = sorted(name for name in METHODS if METHODS[name].anchor)


def drifted(method, x, statistics, g, size=0.3, seed=1):
    """Inputs x' of a compressed network, the statistics with their moments, and the drift, token weights included."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    low = x + size * (0.3 * noise + 0.2 - 0.5 * x.roll(1, 1))
    weight = (
        g.square().sum(1, keepdim=True)
        if method.anchor == "gradients"
        else torch.ones(len(x), 1, dtype=x.dtype)
    )
    weight = weight / weight.sum()
    mean, of_low = (weight * x).sum(0), (weight * low).sum(0)
    covariance = (low - of_low).T @ (weight * (low - of_low))
    drift = Drift((x - mean).T @ (weight * (low - of_low)) - covariance, mean)
    return (
        low,
        weight,
        method.with_input_moments(statistics, covariance + torch.outer(of_low, of_low), of_low),
        drift,
    )


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("out_features,in_features", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_anchored_factors_answer_the_compressed_inputs_best(name, out_features, in_features, rank):
    """E |W x + b - W_hat x' - b'|^2 under the method's own weights of tokens and outputs, with its shrinkage as a pull
    towards W: never more than the un-anchored factors lose on the same x', whichever inputs these were made for."""
    weight, bias, x, statistics = problem(out_features, in_features)
    g = torch.randn(len(x), out_features, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    statistics, method = layer_statistics(x, g), METHODS[name]
    low, tokens, moved, drift = drifted(method, x, statistics, g)
    metric, keep = method.metric(moved), 1 - method.shrink
    centred = low - (tokens * low).sum(0)
    pull = float((metric.inputs - keep * centred.T @ (tokens * centred)).diagonal().mean())
    outputs = torch.eye(out_features, dtype=x.dtype) if metric.outputs is None else metric.outputs

    def loss(down, up, new_bias):
        error, change = x @ weight.T + bias - low @ down.T @ up.T - new_bias, weight - up @ down
        return float(
            keep * (tokens * error @ outputs * error).sum()
            + pull * torch.trace(change.T @ outputs @ change)
        )

    anchored = loss(*method.factor(weight, bias, moved, rank, drift))
    for other in (moved, statistics):
        assert anchored <= loss(*method.factor(weight, bias, other, rank)) * (1 + 1e-9)


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("out_features,in_features", SHAPES)
def test_anchored_at_full_rank_is_the_best_dense_layer_and_without_drift_the_plain_method(
    name, out_features, in_features
):
    weight, bias, x, statistics = problem(out_features, in_features)
    g = torch.randn(len(x), out_features, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    statistics, method = layer_statistics(x, g), METHODS[name]
    low, tokens, moved, drift = drifted(method, x, statistics, g)
    down, up, new_bias = method.factor(weight, bias, moved, min(weight.shape), drift)
    # Means agree over the weighted tokens, whatever the rank.
    torch.testing.assert_close(
        (tokens * (low @ down.T @ up.T + new_bias)).sum(0),
        (tokens * (x @ weight.T + bias)).sum(0),
        rtol=1e-9,
        atol=1e-9,
    )
    low, _, moved, drift = drifted(method, x, statistics, g, size=0)
    for rank in (2, min(weight.shape)):
        down, up, new_bias = method.factor(weight, bias, moved, rank, drift)
        plain = method.factor(weight, bias, statistics, rank)
        torch.testing.assert_close(up @ down, plain[1] @ plain[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(new_bias, plain[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(up @ down, weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("out_features,in_features", [(5, 13), (13, 5)])
def test_anchored_whiten_equals_the_stated_form(out_features, in_features):
    """[W Cov(x, x') L'^-T]_r L'^-1 with L' L'^T = Cov(x')."""
    weight, bias, x, statistics = problem(out_features, in_features)
    method = METHODS["whiten"]
    _, _, moved, drift = drifted(method, x, statistics, x)
    covariance = moved.inputs.covariance
    factor = torch.linalg.cholesky(covariance)
    crossed = torch.linalg.solve_triangular(
        factor.T, weight @ (drift.difference + covariance), upper=True, left=False
    )
    u, s, vt = torch.linalg.svd(crossed, full_matrices=False)
    down, up, _ = method.factor(weight, bias, moved, 3, drift)
    torch.testing.assert_close(
        up @ down @ factor, (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-4, atol=1e-4 * float(s[0])
    )


def test_anchored_survives_statistics_of_less_than_the_width():
    for name in ANCHORED:
        weight, bias, x, statistics = problem(7, 13, tokens=3)
        _, _, moved, drift = drifted(METHODS[name], x, statistics, x[:, :7])
        assert all(
            torch.isfinite(tensor).all()
            for tensor in METHODS[name].factor(weight, bias, moved, 2, drift)
        )
