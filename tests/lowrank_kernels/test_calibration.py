"""Calibration without a GPU: a fake timer in the measuring process, and fake measuring processes for the other side."""

from __future__ import annotations

import gc
import io
import json
import stat
import sys
import weakref
from itertools import count

import pytest
import torch
from kernel_cases import DEVICE

import lowrank_kernels
from lowrank_kernels import backends, calibration, dispatch, inference, rivals, tuning
from lowrank_kernels.problem import Problem
from lowrank_kernels.tools import worker

H100 = tuning.Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)
QKV = Problem("qkv", 5, 40, 40, 12, torch.float32)
LINEAR = Problem("linear", 5, 40, 40, 12, torch.float32)
SLOW = {"backend": "torch", "options": {}, "milliseconds": {"torch": 0.02}}
ENTRY = {"eager": SLOW, "captured": SLOW, "rank": 12}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H100 by its name, a cache of its own, and backends that a test may add to."""
    monkeypatch.setattr(tuning, "gpu", lambda index=None: H100)
    monkeypatch.setenv(tuning.CACHE_ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(calibration.ENVIRONMENT, "1")
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    yield
    backends.operators.cache_clear()


def _request(*problems, skip=()):
    keyed = {tuning.key(problem): problem for problem in problems}
    request = calibration._request(keyed, 0, 0.0, True, dict(skip))
    return {**request, "device": str(DEVICE)}


def _serve(request):
    output = io.StringIO()
    code = worker.serve(request, output)
    return code, [json.loads(line) for line in output.getvalue().splitlines()]


def test_the_measuring_process_compares_times_and_names_the_winners(monkeypatch):
    """Each candidate is begun once; the fastest of each column wins; what is wrong in the last result is left out."""
    times = iter(count(9.0, -1.0))
    monkeypatch.setattr(
        rivals.measure, "milliseconds", lambda *_, captured: (0.0, max(next(times), 0.5), 0.0)
    )

    def wrong(x, downs, ups, biases, *rest):
        outs, hiddens = backends.operators("torch")["qkv"](x, downs, ups, biases)
        return (*outs[:2], outs[2] + 1), hiddens

    lowrank_kernels.register_backend(
        backends.Backend("wrong", lambda d: None, lambda p, d: None, lambda: {"qkv": wrong})
    )
    key = tuning.key(QKV)
    code, events = _serve(_request(QKV, skip={key: ["stacked"]}))
    begun = [event["value"] for event in events if event["event"] == "begin"]
    assert code == 0 and {event["about"] for event in events if event["event"] == "begin"} == {key}
    # Triton's tile for few rows is the one that is likely.
    assert [label.split(" ")[0] for label in begun] == ["torch", "dense", "triton", "wrong"]
    (warning,) = [event["about"] for event in events if event["event"] == "warning"]
    assert "wrong differs from two matmuls" in warning
    entry = events[-1]["value"]
    assert events[-1]["event"] == "entry" and entry["rank"] == 12
    # 9 and 8 for two matmuls, 7 and 6 merged, 5 and 4 fused.
    assert entry["eager"]["milliseconds"] == {"torch": 9.0, "dense": 7.0, "triton": 5.0}
    assert entry["captured"]["backend"] == "triton" and entry["captured"]["options"]["tile"]
    assert tuning.parse(json.dumps({"version": tuning.VERSION, "entries": {key: entry}}), "it")


def test_a_problem_that_cannot_be_measured_is_named_and_a_broken_gpu_ends_the_process(monkeypatch):
    def too_large(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rivals, "fastest", too_large)
    code, events = _serve(_request(LINEAR))
    assert code == 0 and [event["event"] for event in events] == ["warning", "failed"]

    def broken(*_):
        raise rivals.BrokenGpu("triton")

    monkeypatch.setattr(rivals, "fastest", broken)
    assert _serve(_request(LINEAR))[0] == worker.BROKEN


def _begin(problem, label):
    return {"event": "begin", "about": tuning.key(problem), "value": label}


def _entry(problem):
    return {"event": "entry", "about": tuning.key(problem), "value": ENTRY}


ENDED = {"event": "ended", "about": "the measuring process failed: lost", "value": 3}


def _measure(path, problems, runs):
    """``measure_missing`` against processes that say ``runs``; returns what it returned and the requests."""
    requests, answers = [], iter(runs)

    def start(request):
        requests.append(json.loads(json.dumps(request)))
        return iter([*next(answers), ENDED])

    result = calibration.measure_missing(problems, 0, path, budget=0.0, quick=True, start=start)
    return result, requests


def test_what_is_missing_is_measured_once_and_kept(tmp_path):
    path = tmp_path / "calibration" / "table.json"
    twice = [LINEAR, QKV, LINEAR._replace(rows=6)]
    done, requests = _measure(path, twice, [[_begin(LINEAR, "torch"), _entry(LINEAR), _entry(QKV)]])
    assert done == 2 and [problem[:2] for problem in requests[0]["problems"]] == [
        ["linear", 5],
        ["qkv", 5],
    ]
    assert list(tuning.measured(path)) == [tuning.key(LINEAR), tuning.key(QKV)]
    more = QKV._replace(rows=100)
    done, requests = _measure(path, [*twice, more], [[_entry(more)]])
    assert done == 1 and [problem[1] for problem in requests[0]["problems"]] == [100]
    assert _measure(path, twice, []) == (0, [])


def test_a_candidate_that_breaks_the_gpu_or_hangs_is_left_out(tmp_path, capsys):
    key = tuning.key(QKV)
    runs = [
        [_entry(LINEAR), _begin(QKV, "torch"), _begin(QKV, "triton a")],
        [_begin(QKV, "torch"), _begin(QKV, "triton b")],
        [_begin(QKV, "torch"), _entry(QKV)],
    ]
    done, requests = _measure(tmp_path / "table.json", [LINEAR, QKV], runs)
    assert done == 2 and len(requests) == 3
    assert [request["skip"] for request in requests] == [
        {},
        {key: ["triton a"]},
        {key: ["triton a", "triton b"]},
    ]
    assert [len(request["problems"]) for request in requests] == [2, 1, 1]
    assert "triton b broke the GPU or hung, and is left out" in capsys.readouterr().err


@pytest.mark.parametrize("run", [[], [_begin(QKV, "torch")]])
def test_a_process_that_never_comes_far_is_given_up(tmp_path, run):
    """One that begins no candidate, and one that falls over the same candidate although it was told to leave it out."""
    with pytest.raises(calibration.MeasuringError):
        _measure(tmp_path / "table.json", [QKV], [run] * 3)


@pytest.mark.slow
def test_a_real_process_answers_and_a_hanging_one_is_killed(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    events = list(calibration._worker_events(_request(LINEAR)))
    assert [event["event"] for event in events[-2:]] == ["entry", "ended"]
    assert events[-1]["value"] == 0 and events[-2]["value"]["eager"]["backend"]
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\necho noise\necho last words >&2\nexec sleep 60\n")
    hanging.chmod(hanging.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(calibration, "PATIENCE", 0.3)
    (ended,) = calibration._worker_events(_request(LINEAR))
    assert "last words" in ended["about"] and ended["value"] != 0


def test_calibration_where_it_is_wanted_and_where_it_is_not(monkeypatch, tmp_path):
    gpu, asked = torch.device("cuda", 1), []

    def measured(problems, index, path, **options):
        asked.append((problems, index, path))
        return len(problems)

    monkeypatch.setattr(calibration, "measure_missing", measured)
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    before = dispatch.generation
    calibration.calibrate([QKV], gpu)
    problems, index, path = asked[0]
    assert [problem.rows for problem in problems] == list(calibration.ROWS) and index == 1
    assert path == tuning.calibration_file(H100) and dispatch.generation > before
    calibration.calibrate([QKV], torch.device("cpu"))
    with lowrank_kernels.use_backend("torch"):
        calibration.calibrate([QKV], gpu)
    with monkeypatch.context() as off:
        off.setenv(calibration.ENVIRONMENT, "0")
        calibration.calibrate([QKV], gpu)
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    calibration.calibrate([QKV], gpu)
    assert len(asked) == 1


def test_calibration_that_fails_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "calibration").write_text("in the way")
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    with pytest.warns(UserWarning, match="not calibrated: .*LOWRANK_KERNELS_CALIBRATE=0"):
        calibration.calibrate([QKV], torch.device("cuda", 0))


@pytest.mark.parametrize("operator", ["linear", "qkv", "ffn", "linear_norm"])
def test_merged_and_stacked_factors_are_the_same_operator(operator):
    """Against two matmuls in float64; three ranks and a missing bias for query, key and value."""
    problem = Problem(operator, 7, 40, 40, 12, torch.float64, 50 if operator == "ffn" else 0)
    x, factors, rest = rivals.arguments(problem, torch.device("cpu"))
    if operator == "qkv":
        down, up, bias = (list(three) for three in factors)
        down[1], up[1], bias[2] = down[1][:5], up[1][:, :5].contiguous(), None
        factors = (down, up, bias)
    right = backends.bind("torch", operator, factors)(x, *rest)
    names = [name for name in ("dense", "stacked") if backends.has_operator(name, operator, True)]
    assert names == (["dense", "stacked"] if operator == "qkv" else ["dense"])
    for name in names:
        mine = backends.bind(name, operator, factors)(x, *rest)
        assert rivals.largest_difference(mine, right) < 1e-12


def test_only_prepared_calls_may_be_given_to_merged_factors(monkeypatch):
    """A public call would merge them again each time, so there the table's choice gives way to two matmuls."""
    problem = LINEAR._replace(rows=4)
    choice = tuning.Choice("dense", {}, {"dense": 0.01})
    table = tuning.Table({tuning.key(problem): tuning.Entry(choice, choice)})
    monkeypatch.setattr(dispatch, "_device_table", lambda index: table)
    gpu = torch.device("cuda", 0)
    assert dispatch.choose("auto", problem, gpu) == ("torch", {})
    assert dispatch.choose("auto", problem, gpu, prepared=True) == ("dense", {})


def test_what_is_chosen_is_prepared_before_the_first_call_and_not_in_a_capture(monkeypatch):
    down, up, bias = torch.randn(3, 8), torch.randn(5, 3), torch.randn(5)
    bound, bind = [], inference.bind
    monkeypatch.setattr(
        inference, "bind", lambda name, *rest: bound.append(name) or bind(name, *rest)
    )
    layer, x = inference.prepare_linear(down, up, bias), torch.randn(2, 8)
    with lowrank_kernels.use_backend("dense"):
        layer.ready((1, 2))
        assert bound == ["dense"]
        layer(x)
        assert bound == ["dense"]
        dispatch.void_plans()
        monkeypatch.setattr(dispatch, "in_capture", lambda device: True)
        assert layer(x) is None and bound == ["dense"]


def test_merged_factors_follow_a_change_in_place_once_told():
    down, up, bias = torch.randn(3, 8), torch.randn(5, 3), torch.randn(5)
    layer, x = inference.prepare_linear(down, up, bias), torch.randn(2, 8)
    with lowrank_kernels.use_backend("dense"):
        torch.testing.assert_close(layer(x), x @ down.T @ up.T + bias)
        up.mul_(2)
        dispatch.void_plans()
        torch.testing.assert_close(layer(x), x @ down.T @ up.T + bias)


def test_what_a_graph_may_hold_outlives_the_next_choice():
    """A CUDA graph reads merged weights by address; another backend, or another model's calibration, voids the plan."""
    down, up = torch.randn(3, 8), torch.randn(5, 3)
    layer, x = inference.prepare_linear(down, up, None), torch.randn(2, 8)

    def merged() -> weakref.ref:
        (plan,) = layer._plans.values()
        return weakref.ref(plan)

    with lowrank_kernels.use_backend("dense"):
        layer(x)
        eager = merged()
        dispatch.void_plans()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "capturing", lambda device: True)
            layer(x)
        recorded = merged()
        dispatch.void_plans()
        layer(x)
        assert merged()() is not recorded()
    gc.collect()
    assert eager() is None and recorded() is not None
