"""The operators under load: the short form of ``tests/robustness/operators.py``, threads, streams, modes, no memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, FUSED, Sizes, arguments, call

from lowrank_kernels import LowRankLinear, align_factors, backends
from lowrank_kernels.backends import get_backend
from tests.robustness import operators as soak
from tests.robustness.operator_cases import draw_case

ROOT = Path(__file__).resolve().parents[2]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def registered(monkeypatch):
    """Library matmuls behind the registered operators, for the length of a test."""
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    soak.register_library_operators()


@pytest.mark.parametrize(
    "backend, calls, largest",
    [
        ("torch", 80, 64),
        ("registered", 80, 64),
        ("dense", 40, 64),
        ("triton", 10, 24),
        ("cuda", 200, 320),
    ],
)
def test_random_calls(registered, backend, calls, largest):
    reason = get_backend(backend).why_not_on(DEVICE)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    counts, failures = soak.soak(backend, DEVICE, 11, calls, 5, largest)
    assert counts["calls"] == calls and counts["with gradients"] and not failures


def test_the_driver_finds_what_is_wrong(registered):
    """A backend that is wrong in one element, writes to its input, or does not repeat is found out."""
    right = backends.operators("torch")["linear"]

    def wrong(x, *rest):
        y, hidden, pre = right(x, *rest)
        return y.index_fill(1, torch.zeros(1, dtype=torch.long, device=y.device), 3.0), hidden, pre

    def writing(x, *rest):
        results = right(x, *rest)
        return results, x[:1].zero_() if x.numel() else None

    drawn = iter(range(10))

    def wavering(x, *rest):
        y, hidden, pre = right(x, *rest)
        return y * (1 + 1e-2 * next(drawn)), hidden, pre

    number = next(
        number
        for number in range(1000)
        for case in [draw_case(3, number, 16)]
        if case.operator == "linear"
        and case.size.rows
        and case.repeated
        and case.activation != "relu"
    )
    for function, complaint in (
        (wrong, "error"),
        (lambda *a: writing(*a)[0], "written to"),
        (wavering, "a second call"),
    ):
        backends.register_backend(
            backends.Backend(
                "bad", lambda _: None, lambda *_: None, lambda f=function: {"linear": f}
            )
        )
        _, failures = soak.soak("bad", DEVICE, 3, 1, 5, 16, number)
        assert [complaint in failure["error"] for failure in failures] == [True]


def test_a_call_follows_from_its_seed_and_number(registered, capsys):
    assert draw_case(5, 77, 64) == draw_case(5, 77, 64) != draw_case(6, 77, 64)
    given = [
        "--seed",
        "5",
        "--case",
        "77",
        "--backends",
        "torch",
        "--output",
        "/nowhere/at/all.json",
    ]
    assert soak.main(given) == 0
    assert str(draw_case(5, 77, 320)) in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--sanitizer", "memcheck"], "--sanitizer needs --device cuda"),
    ],
)
def test_what_needs_a_gpu_says_so(given, complaint, capsys):
    with pytest.raises(SystemExit):
        soak.main(given)
    assert complaint in capsys.readouterr().err


@pytest.fixture
def same_number_of_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["torch", "registered", "dense"])
def test_eight_threads_get_what_one_gets(registered, same_number_of_threads_after, backend):
    """One layer, one packed pair and every operator, called by eight threads at once: the same bits as one by one."""
    layer = LowRankLinear(50, 65, 13, device=DEVICE)
    layer.backend = backend
    packed = align_factors(layer.down, layer.up)
    sets = {operator: arguments(operator, Sizes(), torch.float32) for operator in FUSED}
    inputs = [torch.randn(count, 50, device=DEVICE) for count in range(1, 25)]

    def work(x):
        with torch.no_grad():
            results = [layer(x), *call("linear", [x, *packed, layer.bias], backend)]
            results += [
                y for operator, tensors in sets.items() for y in call(operator, tensors, backend)
            ]
        leaf = x.clone().requires_grad_()
        return results + list(torch.autograd.grad(layer(leaf).square().sum(), [leaf, layer.down]))

    # A library matmul rounds by the number of OpenMP threads it gets, which is not the same in each Python thread.
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(1, **one_thread) as alone, ThreadPoolExecutor(8, **one_thread) as pool:
        for mine, right in zip(
            pool.map(work, inputs * 4), list(alone.map(work, inputs)) * 4, strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


@NEEDS_GPU
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("operator", FUSED)
def test_streams_get_what_one_stream_gets(operator, backend):
    """Calls queued on four streams, their inputs made on those streams just before: the same bits as one by one."""
    reason = get_backend(backend).why_not_on(DEVICE)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    sets = [
        arguments(operator, Sizes(300 + 8 * count, 768, 768, 245, 1024), torch.bfloat16)
        for count in range(8)
    ]
    alone = [call(operator, tensors, backend) for tensors in sets]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for index, tensors in enumerate(sets):
            with torch.cuda.stream(streams[index % 4]):
                found.append(
                    call(operator, [None if t is None else t.clone() for t in tensors], backend)
                )
        torch.cuda.synchronize()
        assert all(
            torch.equal(a, b)
            for mine, right in zip(found, alone, strict=True)
            for a, b in zip(mine, right, strict=True)
        )


@pytest.mark.parametrize("operator", FUSED)
def test_inference_mode_and_deterministic_mode_change_nothing(operator):
    """The deterministic mode fills fresh memory with NaN and refuses what does not repeat; neither may show."""
    tensors = arguments(operator, Sizes(), torch.float32)
    plain = call(operator, tensors, "triton")
    with torch.inference_mode():
        inferred = call(operator, tensors, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        repeated = call(operator, tensors, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(y.is_inference() for y in inferred)
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(plain, inferred, repeated, strict=True)
    )


def test_a_layer_used_in_inference_mode_can_be_trained_afterwards():
    layer = LowRankLinear(50, 65, 13, device=DEVICE)
    layer.backend = "triton"
    x = torch.randn(3, 50, device=DEVICE)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    assert layer.up.grad.shape == (65, 13)


def test_the_automatic_choice_compiles_to_one_graph_for_every_length():
    from torch._dynamo.testing import CompileCounter

    layer = LowRankLinear(50, 65, 13)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in (3, 8, 21):
        x = torch.randn(2, length, 50)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("width, leading", [(0, (2, 3)), (0, ()), (50, (0, 0, 4))], ids=str)
def test_sizes_of_zero(registered, width, leading):
    """No features leave the bias; no rows leave nothing."""
    tensors = [
        torch.ones(*leading, width, device=DEVICE),
        torch.ones(4, width, device=DEVICE),
        torch.ones(5, 4, device=DEVICE),
        torch.arange(5.0, device=DEVICE),
    ]
    for backend in ("torch", "registered", "triton"):
        y = call("linear", tensors, backend)[0]
        assert y.shape == (*leading, 5) and torch.equal(y, tensors[3].expand_as(y))


NO_MEMORY = """
import resource
import torch
from lowrank_kernels import LowRankLinear, lowrank_ffn, lowrank_linear, lowrank_linear_norm, lowrank_qkv, use_backend

x, down, up = torch.randn(4, 6), torch.randn(3, 6), torch.randn(8, 3)
right = x @ down.T @ up.T
# What a first call imports and compiles needs memory of its own.
lowrank_linear(x, down, up, backend="triton")
one, wide = torch.ones(1, 1), torch.ones(2**20, 1)
tall, wide_input = torch.ones(2**12, 1), torch.ones(2**12, 2**14)
layer = LowRankLinear(1, 2**20, 1)
leaf = wide_input.requires_grad_()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**27, resource.RLIM_INFINITY))


def backward():
    # The gradient of x is 256 MB; the result is 16 kB.
    lowrank_linear(leaf, torch.ones(1, 2**14), one).sum().backward()


calls = [
    lambda: lowrank_linear(tall, one, wide),
    lambda: lowrank_qkv(tall, [one] * 3, [wide] * 3),
    lambda: lowrank_ffn(tall, one, one, None, one, wide, None),
    lambda: lowrank_linear_norm(tall, one, wide, None, one.expand(2**12, 2**20), wide[:, 0], wide[:, 0]),
    lambda: layer(tall),
    backward,
]
for backend in ("torch", "dense", "triton"):
    with use_backend(backend):
        # The interpreter would take minutes for the last one.
        for index, large in enumerate(calls[:-1] if backend == "triton" else calls):
            try:
                large()
            except (RuntimeError, MemoryError) as error:
                assert "memory" in str(error) or isinstance(error, MemoryError), error
            else:
                raise SystemExit(f"call {index} on {backend} found the memory")
            assert torch.allclose(lowrank_linear(x, down, up), right, atol=1e-4)
            assert leaf.grad is None
print("usable")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the CUDA driver needs more address space than the limit gives",
)
def test_out_of_memory_leaves_the_process_usable():
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "usable\n", done.stderr


@NEEDS_GPU
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_out_of_gpu_memory_leaves_the_process_usable(backend):
    reason = get_backend(backend).why_not_on(DEVICE)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    x, down, up, bias = arguments("linear", Sizes(64, 768, 768, 64), torch.bfloat16)
    right = call("linear", [x, down, up, bias], backend)[0]
    rows = torch.cuda.get_device_properties(0).total_memory // (2 * up.shape[0])
    with pytest.raises(torch.OutOfMemoryError):
        call("linear", [x[:1].expand(rows, 768), down, up, bias], backend)
    assert torch.equal(call("linear", [x, down, up, bias], backend)[0], right)
