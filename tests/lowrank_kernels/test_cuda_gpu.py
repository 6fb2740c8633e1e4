"""The operator suite on backend ``cuda``, on a GPU: every tile and cluster, tails, strides, poison, gradients, repeats.

``python -m benchmarks.gpu`` runs it. ``-k small`` chooses what compute-sanitizer gets through.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Sizes, arguments, assert_no_worse, call, check, exact, gradients

from lowrank_kernels.backends import get_backend, operators

REASON = get_backend("cuda").why_not_on(
    torch.device("cuda" if torch.cuda.is_available() else "cpu")
)
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"needs a GPU with the CUDA kernels ({REASON})"
)
HOPPER = REASON is None and torch.cuda.get_device_capability()[0] == 9
DTYPES = (torch.bfloat16, torch.float16)
ODD = (
    Sizes(1, 8, 8, 1, 8),
    Sizes(37, 72, 136, 13, 72),
    Sizes(129, 768, 392, 245, 200),
    Sizes(300, 200, 1032, 256, 520),
    Sizes(65, 136, 520, 100, 3072),
    Sizes(4097, 768, 768, 245, 3072),
)
# Rows of a tile, CTAs of a cluster, whether they share the weights, a rank that it holds.
SHAPES = [(128, c, False, r) for c in (1, 2, 4, 8) for r in (40, 245)] + [
    (64, c, False, r) for c in (1, 2, 4, 8) for r in (245, 500)
]
SHAPES += [(128, 2, True, 245), (64, 2, True, 500), (128, 2, True, 40)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ODD, ids=str)
@pytest.mark.parametrize("operator", ["linear", "ffn", "linear_norm"])
def test_no_worse_than_unfused(operator, size, dtype, seed):
    torch.manual_seed(seed)
    check(operator, size, dtype, "cuda")


@pytest.mark.skipif(not HOPPER, reason="clusters need compute capability 9.0")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_and_cluster_small(shape, dtype):
    """Every shape of the linear at sizes that cut every tile; more row tiles than fit at once: in the larger test."""
    tile_rows, cluster, weights, rank = shape
    for count in (1, 200):
        tensors = arguments("linear", Sizes(count, 136, 1032, rank), dtype)
        run = operators("cuda")["linear"]
        mine = [
            t
            for t in run(*tensors, "gelu", None, True, False, tile_rows, cluster, weights)
            if t is not None
        ]
        unfused = [
            t for t in operators("torch")["linear"](*tensors, "gelu", None, True) if t is not None
        ]
        truth = [
            t
            for t in operators("torch")["linear"](*exact(tensors), "gelu", None, True)
            if t is not None
        ]
        assert_no_worse(mine, unfused, truth)


@pytest.mark.skipif(not HOPPER, reason="clusters need compute capability 9.0")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cluster, rank", [(1, 245), (2, 245), (4, 245), (8, 245), (1, 100), (4, 100)]
)
def test_every_ffn_cluster_small(cluster, rank, dtype):
    for count in (1, 200):
        tensors = arguments("ffn", Sizes(count, 136, 392, rank, 1000), dtype)
        results = [
            function(*given, "gelu", True, *extra)
            for function, given, extra in (
                (operators("cuda")["ffn"], tensors, (cluster,)),
                (operators("torch")["ffn"], tensors, ()),
                (operators("torch")["ffn"], exact(tensors), ()),
            )
        ]
        assert_no_worse(*(list(result) for result in results))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_activations_and_no_bias_small(operator, activation):
    check(
        operator,
        Sizes(70, 72, 136, 45, 200),
        torch.float16,
        "cuda",
        bias=False,
        activation=activation,
    )
    check(operator, Sizes(70, 72, 136, 45, 200), torch.bfloat16, "cuda", activation=activation)


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t + torch.nan], 1).flatten(0, 1)[::2],
    ],
    ids=["turned", "every other row"],
)
@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_strides_do_not_matter(operator, cut):
    tensors = arguments(operator, Sizes(21, 72, 136, 13, 72), torch.float16)
    views = [t if t is None or t.dim() < 2 else cut(t) for t in tensors]
    assert torch.equal(call(operator, views, "cuda")[0], call(operator, tensors, "cuda")[0])


@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_outputs_are_fully_written_small(operator, monkeypatch):
    """Memory that the launchers allocate is poisoned with NaN; none is left in any result."""
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: real(*a, **k).fill_(torch.nan))
    tensors = arguments(operator, Sizes(333, 72, 392, 45, 200), torch.bfloat16)
    results = operators("cuda")[operator](
        *tensors, "gelu", *((None, True, True) if operator == "linear" else (True,))
    )
    assert all(not result.isnan().any() for result in results)


@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_nan_and_inf_stay_in_their_row(operator):
    tensors = arguments(operator, Sizes(200, 72, 136, 45, 72), torch.bfloat16)
    clean = call(operator, tensors, "cuda", "relu")[0]
    tensors[0][3, 7], tensors[0][130, 2] = torch.nan, torch.inf
    mine, right = (
        call(operator, tensors, "cuda", "relu")[0],
        call(operator, tensors, "torch", "relu")[0],
    )
    others = torch.ones(200, dtype=torch.bool)
    others[[3, 130]] = False
    assert torch.equal(mine[others], clean[others]) and torch.equal(mine.isnan(), right.isnan())


@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_gradients(operator):
    tensors = arguments(operator, Sizes(70, 72, 136, 45, 200), torch.bfloat16)
    wanted = [index for index, tensor in enumerate(tensors) if tensor is not None]
    mine, unfused, truth = (
        gradients(operator, given, backend, wanted, "gelu")
        for given, backend in ((tensors, "cuda"), (tensors, "torch"), (exact(tensors), "torch"))
    )
    assert_no_worse(mine, unfused, truth)


@pytest.mark.parametrize("operator", ["linear", "ffn"])
def test_runs_repeat_to_the_bit(operator):
    tensors = arguments(operator, Sizes(4097, 768, 768, 245, 3072), torch.bfloat16)
    first = call(operator, tensors, "cuda")[0]
    assert all(torch.equal(first, call(operator, tensors, "cuda")[0]) for _ in range(20))
