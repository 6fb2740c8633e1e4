"""Who runs a call: precedence, tables, registration."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from kernel_cases import DEVICE, Sizes, arguments, call

import lowrank_kernels
from lowrank_kernels import backends, dispatch, rivals, tuning
from lowrank_kernels.problem import Problem
from lowrank_kernels.tools import tune
from lowrank_kernels.triton_backend import support
from lowrank_kernels.triton_backend.tiles import Tile

TILE = Tile(64, 64, 64, 0, 4, 3, 2)
H100 = tuning.Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)


def _spy(name, calls):
    """A backend that notes its calls and computes as ``torch`` does."""

    def linear(*args, **kwargs):
        calls.append((name, kwargs.pop("tile", None)))
        return backends.operators("torch")["linear"](*args, **kwargs)

    return backends.Backend(
        name,
        lambda device: None,
        lambda problem, device: None,
        lambda: {"linear": linear},
        support.parse_options,
    )


@pytest.fixture
def calls(monkeypatch):
    """Two more backends for the length of a test."""
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    noted = []
    for name in ("first", "second"):
        lowrank_kernels.register_backend(_spy(name, noted))
    yield noted
    backends.operators.cache_clear()


def test_argument_beats_override_beats_default(calls):
    tensors = arguments("linear", Sizes())
    plain = call("linear", tensors, None)[0]
    assert not calls
    with lowrank_kernels.use_backend("first"):
        assert torch.equal(call("linear", tensors, None)[0], plain)
        call("linear", tensors, "second")
        call("linear", tensors, "torch")
        layer = lowrank_kernels.LowRankLinear(50, 65, 13, device=DEVICE)
        layer(tensors[0])
        layer.backend = "second"
        layer(tensors[0])
    call("linear", tensors, None)
    assert [name for name, _ in calls] == ["first", "second", "first", "second"]
    assert "first" in lowrank_kernels.backend_names()


def test_overrides_of_threads_that_overlap(calls):
    """The block entered last counts while it is open, and nothing is left over when all have gone."""
    one, two = lowrank_kernels.use_backend("first"), lowrank_kernels.use_backend("second")
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)
    assert lowrank_kernels.explain_backend("cpu")[0] == "second"
    two.__exit__(None, None, None)
    assert lowrank_kernels.explain_backend("cpu")[0] == "torch"


def test_a_backend_registered_again_replaces_the_old_one(calls):
    tensors = arguments("linear", Sizes())
    call("linear", tensors, "first")
    lowrank_kernels.register_backend(
        backends.Backend("first", lambda d: "it went away", lambda p, d: None, dict)
    )
    with pytest.raises(ValueError, match="backend is 'first', but it went away"):
        call("linear", tensors, "first")


def test_a_call_runs_on_the_gpu_of_its_tensors(calls, monkeypatch):
    """Triton launches on the current GPU: tensors on another one make that the current one for the call."""
    entered = []
    monkeypatch.setattr(dispatch, "_device_table", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch.cuda,
        "device",
        lambda device: entered.append(device.index) or contextlib.nullcontext(),
    )
    x, down, up, bias = (t.cpu() for t in arguments("linear", Sizes()))
    problem = Problem("linear", 7, 50, 65, 13, torch.float32)
    for index in (0, 1):
        dispatch.run("first", problem, torch.device("cuda", index), x, down, up, bias, "none")
    assert entered == [1] and len(calls) == 2


def test_an_operator_that_a_backend_lacks_is_served_by_torch(calls):
    tensors = arguments("ffn", Sizes())
    assert torch.equal(call("ffn", tensors, "first")[0], call("ffn", tensors, "torch")[0])


@pytest.mark.slow
def test_environment_variable_overrides():
    code = "import lowrank_kernels as l; print(*l.explain_backend('cpu'))"
    settings = {**os.environ, "LOWRANK_KERNELS_BACKEND": "dense"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings
    )
    assert done.stdout.startswith("dense ") and "LOWRANK_KERNELS_BACKEND" in done.stdout


@pytest.mark.slow
def test_import_touches_no_gpu_and_no_triton():
    code = (
        "import sys, torch, lowrank_kernels; layer = lowrank_kernels.LowRankLinear(8, 8, 4); layer(torch.ones(1, 8));"
        "assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules, 'triton was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explanations():
    name, reason = lowrank_kernels.explain_backend("cpu")
    assert name == "torch" and "two library matmuls" in reason and "\n" not in reason
    name, reason = lowrank_kernels.explain_backend("meta", "triton")
    assert name == "torch" and reason.startswith("triton cannot run")
    if not torch.cuda.is_available():
        assert lowrank_kernels.explain_backend("cuda") == ("torch", "torch sees no GPU")
    with pytest.raises(
        ValueError, match="backend is 'tritn'; it must be None, 'auto' or one of torch"
    ):
        lowrank_kernels.explain_backend("cpu", "tritn")
    with pytest.raises(ValueError, match="backend is 'tritn'"):
        call("linear", arguments("linear", Sizes()), "tritn")


def _table(entries):
    return json.dumps(
        {"version": tuning.VERSION, "device": H100.name, "environment": {}, "entries": entries}
    )


def _entry(backend, tile=None, captured=True):
    options = {} if tile is None else {"tile": asdict(tile)}
    choice = {"backend": backend, "options": options, "milliseconds": {backend: 0.01}}
    slow = {"backend": "torch", "options": {}, "milliseconds": {"torch": 0.02}}
    return {"eager": choice, "captured": choice if captured else slow, "rank": 245}


def test_table_is_read_by_bucket_and_decides(tmp_path, monkeypatch, calls):
    """A file of the tuner's own writer decides call by call, tile included; the rest is two matmuls."""
    small = Problem("linear", 4, 768, 768, 245, torch.float32)
    large = small._replace(rows=5000)
    entries = {
        tuning.key(small): _entry("first"),
        tuning.key(large): _entry("second", TILE, captured=False),
    }
    tuning.write(tmp_path / tuning.file_name(H100.name), H100, {}, entries)
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(tuning.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    table = tuning.load(H100)
    assert table.find(small._replace(rows=1, inner=704, rank=200)).eager.backend == "first"
    last = table.find(large._replace(rows=65536))
    assert last.eager == tuning.Choice("second", {"tile": TILE}, {"second": 0.01})
    assert last.captured.backend == "torch"
    for other in (
        small._replace(rank=64),
        small._replace(outer=3072),
        small._replace(dtype=torch.float16),
        small._replace(operator="qkv"),
        small._replace(hidden=3072),
        small._replace(inner=700),
    ):
        assert table.find(other) is None
    monkeypatch.setattr(dispatch, "_device_table", lambda index: table)
    gpu = torch.device("cuda", 0)
    assert dispatch.choose("auto", small, gpu) == ("first", {})
    assert dispatch.choose("auto", large, gpu) == ("second", {"tile": TILE})
    assert dispatch.choose("auto", small._replace(rank=64), gpu) == ("torch", {})
    assert dispatch.choose("auto", large, gpu, captured=True) == ("torch", {})
    assert dispatch.choose("first", large, gpu) == ("first", {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 0, "entries": {}}',
        _table({"linear/x": {"options": None}}),
        _table({"linear/x/mfew": _entry("torch")}),
    ],
)
def test_a_broken_table_is_named(text):
    with pytest.raises(ValueError, match=r"broken.json is no tuning table .*lowrank_kernels.tune"):
        tuning.parse(text, "broken.json")


def test_packaged_tables_hold_measurements_only():
    for path in tuning.folders()[-1].glob("*.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"].values():
            for column in tuning.COLUMNS:
                times = entry[column]["milliseconds"]
                assert times[entry[column]["backend"]] == min(times.values()) > 0


def test_tuning_picks_the_fastest_right_candidate(monkeypatch, calls):
    """The tuner's loop on the CPU: a wrong rival is refused and a slow one loses."""
    problem = Problem("linear", 5, 24, 20, 16, torch.float32)
    wrong = {"linear": lambda x, down, up, *rest: (torch.zeros(5, 20), None, None)}
    lowrank_kernels.register_backend(
        backends.Backend("wrong", lambda d: None, lambda p, d: None, lambda: wrong)
    )
    monkeypatch.setattr(
        rivals, "candidates", lambda *_: [("torch", {}), ("first", {}), ("wrong", {})]
    )
    # Eager and captured for each of the two that are right: in a graph the other one wins.
    speeds = iter([3.0, 0.5, 1.0, 2.0])
    monkeypatch.setattr(
        rivals.measure, "milliseconds", lambda *_, captured: (0.0, next(speeds), 0.0)
    )
    warnings = []
    assert rivals.fastest(problem, torch.device("cpu"), 0.01, warn=warnings.append) == tuning.Entry(
        tuning.Choice("first", {}, {"torch": 3.0, "first": 1.0}),
        tuning.Choice("torch", {}, {"torch": 0.5, "first": 2.0}),
    )
    assert len(warnings) == 1 and "wrong differs from two matmuls" in warnings[0]


def test_a_candidate_that_breaks_the_gpu_is_named(monkeypatch, calls):
    def breaking(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    lowrank_kernels.register_backend(
        backends.Backend("bad", lambda d: None, lambda p, d: None, lambda: {"linear": breaking})
    )
    monkeypatch.setattr(rivals, "candidates", lambda *_: [("torch", {}), ("bad", {})])
    problem, cpu = Problem("linear", 5, 24, 20, 16, torch.float32), torch.device("cpu")
    with pytest.raises(rivals.BrokenGpu, match=r"^bad$"):
        rivals.fastest(problem, cpu, 0.001)
    assert rivals.fastest(problem, cpu, 0.001, skip=["bad"]).eager.backend == "torch"


def test_a_table_serves_gpus_of_one_kind_under_any_name(tmp_path, monkeypatch):
    """A table is found by name first, then by capability and multiprocessors; calibration counts more than both."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "tables"))
    monkeypatch.setenv(tuning.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    assert not tuning.any_tables() and tuning.load(H100) is None
    problem = Problem("linear", 128, 768, 768, 128, torch.bfloat16)
    entries = {tuning.key(problem): _entry("dense")}
    tuning.write(tmp_path / "tables" / tuning.file_name(H100.name), H100, {}, entries)
    assert tuning.any_tables()
    h200, h100_pcie = tuning.Gpu("NVIDIA H200", "9.0", 132), tuning.Gpu("NVIDIA H100", "9.0", 114)
    assert tuning.load(h200).measured_on == H100.name and tuning.load(h100_pcie) is None
    assert tuning.load(h200).find(problem).eager.backend == "dense"
    own = {tuning.key(problem): _entry("torch")}
    tuning.write(tuning.calibration_file(h200), h200, {}, own)
    assert tuning.load(h200).find(problem).eager.backend == "torch"
    assert tuning.load(H100).find(problem).eager.backend == "dense"


def test_a_compiled_graph_asks_for_a_table_once(monkeypatch):
    """Where no table decides, a compiled graph keeps that answer, so that it holds plain matmuls."""
    asked = []
    monkeypatch.setattr(dispatch, "_device_table", lambda index: asked.append(index))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if dispatch._has_table(0) else x * 2, fullgraph=True, backend="eager"
    )
    assert compiled(torch.tensor(3.0)).item() == compiled(torch.tensor(3.0)).item() == 6.0
    assert asked == [0]


def test_commands_without_a_gpu(capsys):
    from lowrank_kernels import env

    assert env.main() == 0
    text = capsys.readouterr().out
    assert "backend triton" in text and "automatic choice" in text
    assert "checked on H100" in text and "unverified" not in text
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
