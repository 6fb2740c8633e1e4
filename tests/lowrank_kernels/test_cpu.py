"""The compiled CPU kernels on every instruction set of this processor: integer sums, and float64 for the rest."""

import pytest
import torch
import torch.nn.functional as F

from lowrank_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.levels(), reason=str(cpu.why_not()))
LEVELS = cpu.levels() or ("none",)
# Rows, inputs, outputs: one, odd, and more than a tile, a block and a vector of each.
SHAPES = [(1, 1, 1), (1, 5, 3), (6, 64, 64), (7, 33, 70), (13, 250, 17), (25, 66, 130)]
ADD, STORE, ENCODE = 0, 1, 2


def run(layer, x, y, target=STORE, activation="none", codes=(1.0, 0, 255)):
    activation = getattr(cpu.module().Activation, activation)
    layer.run(x.data_ptr(), len(x), y.data_ptr(), target, activation, cpu.codes(*codes))
    return y


def int8_case(level, rows, inputs, outputs, extreme=False):
    top = cpu.largest_code(level)
    x = torch.randint(0, top + 1, (rows, inputs), dtype=torch.uint8)
    w = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    if extreme:
        x.fill_(top)
        w.fill_(127)
        w[1::2] = -127
    scale, bias = torch.rand(outputs) / 100, torch.randn(outputs)
    exact = (x.long() - 9) @ w.long().t() * (0.03 * scale.double()) + bias.double()
    codes = cpu.codes(0.03, 9, top)
    return x, cpu.linear([cpu.product8(level, w, scale, bias, codes)]), exact


def encoded(exact, scale, zero, top):
    return ((exact / scale).round() + zero).clamp(0, top)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_products_are_the_integer_sums(level, shape):
    for extreme in (False, True):
        x, layer, exact = int8_case(level, *shape, extreme)
        size = exact.abs().max().item()
        stored = run(layer, x, torch.empty(exact.shape))
        assert (stored - exact).abs().max() <= 2e-7 * size
        before = torch.randn(exact.shape)
        added = run(layer, x, before.clone(), ADD)
        assert (added - before - exact).abs().max() <= 4e-7 * (size + 4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
def test_results_are_encoded_after_the_activation(level, activation):
    top = cpu.largest_code(level)
    for shape in SHAPES:
        x, layer, exact = int8_case(level, *shape)
        if activation == "relu":
            exact = exact.relu()
        elif activation != "none":
            exact = F.gelu(exact, approximate="tanh" if activation == "gelu_tanh" else "none")
        # Smaller than the results' range, so that both ends are cut off.
        scale = max(exact.abs().max().item() / top, 0.01)
        y = run(
            layer,
            x,
            torch.empty(exact.shape, dtype=torch.uint8),
            ENCODE,
            activation,
            (scale, 40, top),
        )
        real = exact / scale + 40
        # The nearest code; either neighbour where the value lies between the two up to rounding.
        assert (y - real.clamp(0, top)).abs().max() <= 0.5 + 1e-3
        assert (y != encoded(exact, scale, 40, top)).double().mean() <= 0.01 or exact.numel() < 100


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_code_is_one_that_does_not_overflow(level):
    top = cpu.largest_code(level)
    assert top in (127, 255)
    if top == 127:
        weight, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2)
        with pytest.raises(ValueError, match="overflow"):
            cpu.product8(level, weight, scale, None, cpu.codes(1.0, 0, 128))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float_products_are_close_to_float64(level, shape):
    rows, inputs, outputs = shape
    x, w, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    exact = x.double() @ w.double().t() + bias.double()
    y = run(cpu.linear([cpu.product(level, w, bias)]), x, torch.empty(rows, outputs))
    bound = 1.2e-7 * (inputs + 2) * (x.abs().double() @ w.abs().double().t() + bias.abs())
    assert ((y - exact).abs() <= bound).all()
    y = run(cpu.linear([cpu.product(level, w, bias, 0.5)]), x, torch.empty(rows, outputs))
    assert ((y - exact / 2).abs() <= bound).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rank", [1, 9, 70])
def test_pairs_are_their_two_products(level, rank):
    x, down = torch.randn(11, 37), torch.randn(rank, 37)
    up, bias = torch.randn(50, rank), torch.randn(50)
    pair = cpu.linear([cpu.product(level, down, None), cpu.product(level, up, bias)])
    exact = x.double() @ down.double().t() @ up.double().t() + bias.double()
    y = run(pair, x, torch.empty(11, 50))
    assert (y - exact).norm() <= 1e-6 * exact.norm()
    top = cpu.largest_code(level)
    source, inner = (0.02, 50, top), (0.11, 60, top)
    first = torch.randint(-127, 128, (rank, 37), dtype=torch.int8)
    second = torch.randint(-127, 128, (50, rank), dtype=torch.int8)
    scales = torch.rand(rank) / 100 + 1e-3, torch.rand(50) / 100
    products = [
        cpu.product8(level, first, scales[0], None, cpu.codes(*source)),
        cpu.product8(level, second, scales[1], bias, cpu.codes(*inner)),
    ]
    codes = torch.randint(0, top + 1, (11, 37), dtype=torch.uint8)
    between = run(
        cpu.linear(products[:1]),
        codes,
        torch.empty(11, rank, dtype=torch.uint8),
        ENCODE,
        codes=inner,
    )
    exact = (between.long() - 60) @ second.long().t() * (0.11 * scales[1].double()) + bias.double()
    y = run(cpu.linear(products, cpu.codes(*inner)), codes, torch.empty(11, 50))
    assert (y - exact).abs().max() <= 2e-7 * exact.abs().max()


@pytest.mark.parametrize("level", LEVELS)
def test_activations_stay_within_their_bounds(level):
    # Every 2048th float32 between 2^-20 and 32, both signs: neighbours differ by less than 3e-4 of themselves.
    positive = torch.arange(0x35800000, 0x42000000, 2048, dtype=torch.int32).view(torch.float32)
    x = torch.cat([positive, -positive, torch.tensor([0.0, 1e30, -1e30, torch.inf])])
    for name, bound, exact in (
        ("gelu", 6e-6, F.gelu(x.double())),
        ("gelu_tanh", 2e-6, F.gelu(x.double(), approximate="tanh")),
        ("relu", 0.0, x.double().relu()),
    ):
        y = torch.empty_like(x)
        activation = getattr(cpu.module().Activation, name)
        cpu.module().activate(level, x.data_ptr(), y.data_ptr(), x.numel(), activation)
        finite = torch.isfinite(exact)
        error = (y.double() - exact)[finite].abs() / exact[finite].abs().clamp_min(8)
        assert error.max() * 8 <= bound + 1e-7
        assert (y[~finite] == exact[~finite]).all()


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        (["1110", "1000", "1111"], [3, 1, 4]),
        (["1"], [1]),
        ([], []),
        (["1110", "0000"], None),
        (["0111"], None),
        (["1101"], None),
    ],
)
def test_tokens_at_the_start_of_their_rows_are_counted(rows, lengths):
    keep = torch.tensor([[token == "1" for token in row] for row in rows], dtype=torch.bool)
    keep = keep.view(len(rows), -1) if rows else keep.view(0, 4)
    assert cpu.prefix_lengths(keep) == lengths
    assert cpu.prefix_lengths(keep.t().contiguous().t()) == lengths
