"""The benchmark for GPUs, rehearsed: every stage at toy sizes in Triton's interpreter, and the limits of a stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, clusters, correct, encoders, micro, sweep, training
from benchmarks.gpu.results import TOY, Results, Setting
from lowrank_kernels import rivals
from lowrank_kernels.backends import get_backend
from lowrank_kernels.cuda_backend import support as cuda_support
from lowrank_kernels.problem import Problem
from lowrank_kernels.triton_backend import support

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for a CPU")


@pytest.fixture
def setting(tmp_path):
    """Smaller than a rehearsal by the command, whose stages are the same."""
    sizes = {**TOY, "points": ("2x4",), "width": 32, "neurons": 48}
    results = Results(tmp_path / command.RESULTS)
    return Setting(results, time.time() + 600, **sizes)


@pytest.mark.slow
def test_every_operator_is_checked_and_nothing_twice(setting):
    correct.run(setting)
    found = setting.results.known()
    checks = {key: one for key, one in found.items() if key.startswith("correct/")}
    assert len(checks) == len(list(correct.cases(setting, "triton"))) == 17
    assert all(one["ok"] for one in checks.values()), checks
    assert all(one["error"] < 1e-2 for one in checks.values())
    before = setting.results.path.read_text()
    correct.run(setting)
    assert setting.results.path.read_text() == before


def test_a_wrong_kernel_is_a_result_and_not_the_end(setting, monkeypatch):
    monkeypatch.setattr(correct, "check", lambda *_: 1 / 0)
    result = correct.checked(next(correct.cases(setting, "triton")), "triton")
    assert not result["ok"] and "ZeroDivisionError" in result["error"]


def test_a_reason_is_given_where_a_backend_does_not_run(setting):
    correct.run(setting, "cuda")
    assert setting.results.known()["correct/cuda"]["error"]
    assert "wrong: correct/cuda" in command.summary(setting.results)


@pytest.mark.slow
def test_operators_are_timed_against_their_rivals(setting, monkeypatch):
    chosen = micro.problems(setting)[:2]
    monkeypatch.setattr(micro, "problems", lambda _: chosen)

    def once(call, inputs, seconds, captured=True):
        call(inputs[0])
        return 1.0, 2.0, 4.0

    monkeypatch.setattr(micro.measure, "milliseconds", once)
    micro.run(setting)
    found = {k: v for k, v in setting.results.known().items() if k.startswith("micro/")}
    assert set(found) == {"micro/ffn/32x48x32/r16/m5", "micro/qkv/32xx32/r16/m5"}
    for one in found.values():
        assert {"torch", "dense", "triton", "triton, 4 splits"} <= set(one["rivals"])
        for rival in one["rivals"].values():
            assert rival["off"] < 1e-3 and rival["ms"] == rival["eager_ms"] == 2.0
            assert rival["spread"] == 3.0 and rival["host_us"] > 0
    assert "micro/ffn" in command.summary(setting.results)


@pytest.mark.slow
def test_encoders_training_and_calibration_leave_their_lines(setting):
    encoders.run(setting)
    encoders.run_by_table(setting)
    training.run_calibration(setting)
    training.run(setting)
    found = setting.results.known()
    row = found["encoder/2x4"]
    assert "48 %, fused runtime, triton, eager" in row["rows"] and not row["failed"]
    assert all(off < 1e-3 for off in row["logits_off"].values()) and row["logits_off"]
    assert "48 %, fused runtime, auto, eager" in found["by table/2x4"]["rows"]
    assert (
        found["calibration/matrices"]["seconds"] > 0 and found["calibration/units"]["seconds"] > 0
    )
    assert {"torch", "triton"} == set(found["training/48 %"]["ms"])
    assert "encoder/2x4: " in command.summary(setting.results)


def test_late_stages_begin_nothing(setting, tmp_path):
    late = Setting(Results(tmp_path / "none.jsonl"), time.time() - 1, **TOY)
    correct.run(late)
    micro.run(late)
    assert not late.results.known()


def test_a_stage_is_stopped_with_its_children_and_a_crash_is_said(tmp_path):
    log = tmp_path / "log.txt"
    begin = time.time()
    command_line = ["sh", "-c", "echo begun; sleep 50 & wait"]
    assert command.run_limited(command_line, 0.5, log) == "stopped after 0 s"
    assert time.time() - begin < 20 and "begun" in log.read_text()
    assert command.run_limited(["sh", "-c", "exit 3"], 30, log) == "ended with code 3"
    assert command.run_limited(["true"], 30, log) == "done"


def test_lines_are_stamped_and_a_cut_one_is_left_out(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add("a", ms=1 / 3, nested={"x": 2 / 3})
    with results.path.open("a") as stream:
        stream.write('{"key": "cut", "ms"')
        stream.write('\n{"key": "of another commit", "commit": "0"}\n')
    (one,) = results.known().values()
    assert one["ms"] == 0.33333 and one["nested"] == {"x": 0.66667}
    assert {"gpu", "driver", "torch", "triton", "commit"} <= set(json.loads(json.dumps(one)))


def test_every_stage_has_its_function_and_the_time_is_enough():
    for stage in command.STAGES.values():
        assert callable(command.stage_function(stage))
    rehearsed = [name for name, stage in command.STAGES.items() if stage.rehearsed]
    assert rehearsed == list(command.STAGES)[: len(rehearsed)], "the most valuable come first"
    assert sum(command.STAGES[name].seconds for name in rehearsed) < 13 * 60
    assert sum(command.STAGES[name].seconds for name in command.NEXT) <= 13 * 60
    with pytest.raises(SystemExit):
        command.main(["no-such-stage"])


def test_outcomes_are_read_from_the_lines_of_parallel_and_plain_runs():
    name = "test_gpu.py::test_x[linear-torch.float16, 3]"
    for line in (
        f"[gw11] [  5%] PASSED tests/lowrank_kernels/{name} \n",
        f"tests/lowrank_kernels/{name} PASSED    [ 50%]\n",
    ):
        found = checks.OUTCOME.search(line)
        assert found["name"] == name and (found["before"] or found["after"]) == "PASSED"
    for line in (
        f"FAILED tests/lowrank_kernels/{name} - AssertionError\n",
        "0.60s call     tests/lowrank_kernels/test_gpu.py::test_x\n",
        f"tests/lowrank_kernels/{name} \n",
    ):
        found = checks.OUTCOME.search(line)
        assert found is None or not (found["before"] or found["after"])


@pytest.mark.slow
def test_tests_that_run_out_of_time_leave_their_counts(setting, monkeypatch, tmp_path):
    """One passes, one fails and one hangs: the first two are in the results, and nothing is left running."""
    folder = tmp_path / "tests" / "lowrank_kernels"
    folder.mkdir(parents=True)
    (folder / "test_three.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(99)\n"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "TESTS", ("test_three",))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    begin = time.time()
    checks.run_tests(replace(setting, deadline=begin + 5))
    found = setting.results.known()
    assert time.time() - begin < 60
    assert found["tests"]["passed"] == found["tests"]["failed"] == 1
    assert not found["tests"]["finished"] and not found["tests/test_three.py::test_b"]["ok"]


def test_every_tile_of_the_sweep_can_be_made_and_every_cluster_has_a_name(monkeypatch):
    found = list(sweep.candidates(torch.device("cpu")))
    assert found and len({problem for problem, _ in found}) == sum(
        len(rows) for _, rows in sweep.SIZES
    )
    for problem, options in found:
        tile = support.parse_options(options)["tile"]
        assert tile.block_m >= 64 or problem.rows <= 1024
    monkeypatch.setattr(cuda_support, "capability", lambda device: 9)
    problem = Problem("linear", 4096, 768, 3072, 256, torch.bfloat16)
    named = [clusters.name(one) for one in cuda_support.candidates(problem, torch.device("cuda"))]
    assert len(named) == len(set(named)) == 11 and named[:2] == ["free", "128 c1"]


def test_sweeps_leave_a_line_a_size_with_every_tile_and_cluster(setting, monkeypatch):
    """At toy sizes; a tile that is wrong is named and not timed."""

    def once(call, inputs, seconds, captured=True):
        call(inputs[0])
        return 1.0, 2.0, 4.0

    monkeypatch.setattr(micro.measure, "milliseconds", once)
    monkeypatch.setattr(sweep, "SIZES", ((("linear", 32, 48, 0, 128), (5,)),))
    monkeypatch.setattr(sweep, "TILES", {("linear", 128): ((16, 32, 32, 0, 4, 2),)})
    real = rivals.prepared

    def prepared(backend, problem, factors, rest, options):
        if backend == "cuda":
            return real("torch", problem, factors, rest, {})
        call = real(backend, problem, factors, rest, options)
        if options.get("tile", {}).get("block_n") == 32:
            return lambda x: (call(x)[0] + 1, None, None)
        return call

    monkeypatch.setattr(rivals, "prepared", prepared)
    sweep.run(setting)
    one = setting.results.known()["sweep/linear/32xx48/r128/m5"]
    assert one["library_us"] == 2000.0 and len(one["us"]) >= 3 and one["us"][0][0] == 2000.0
    assert len(one["us"][0][1]) == len(one["fields"]) == 7
    assert all("differs" in text for text in one["left_out"].values()) and one["left_out"]

    cuda = replace(get_backend("cuda"), why_not_on=lambda _: None)
    monkeypatch.setattr(clusters, "get_backend", lambda _: cuda)
    monkeypatch.setattr(cuda_support, "capability", lambda device: 9)
    monkeypatch.setattr(clusters, "SIZES", (("linear", 32, 200, 0), ("ffn", 32, 32, 72)))
    monkeypatch.setattr(clusters, "ROWS", (5,))
    clusters.run(setting)
    found = setting.results.known()
    lines = {key: set(found[key]["us"]) for key in found if key.startswith("clusters/")}
    assert lines["clusters/ffn/32x72x32/r128/m5"] == {"torch", "dense", "free", "c1", "c2"}
    assert len(lines) == 4 and {"128 c2 w", "64 c2 w"} <= lines["clusters/linear/32xx200/r256/m5"]


KERNEL = """
import sys
from pathlib import Path

import torch

from benchmarks import host_path
from benchmarks.gpu import ahead
from lowrank_kernels import backends


def call():
    pair = torch.zeros(16, 32).half(), torch.zeros(48, 16).half()
    return backends.bind("triton", "linear", (*pair, None, "none"))(torch.zeros(64, 32).half())


counts, (filled, cache) = {}, map(Path, sys.argv[2:])
if sys.argv[1] == "fill":
    ahead._calls = lambda: iter([call])
    counts = ahead.fill(filled, 100)
else:
    assert ahead.bring(filled, cache) >= 1 and ahead.bring(filled, cache) == 0
    host_path.install()
    with ahead.counted(counts):
        call()
print(int(counts["compiled"]), int(counts["found"]), "counted")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_what_is_compiled_ahead_is_found_by_another_process_in_another_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(checks.ROOT), "TRITON_STORE_BINARY_ONLY": "1"}
    filled, cache = tmp_path / "filled", tmp_path / "cache"
    cache.mkdir()
    for what, where, expected in (("fill", filled, "1 0"), ("find", cache, "0 1")):
        done = subprocess.run(
            [sys.executable, "-c", KERNEL, what, str(filled), str(cache)],
            env={**environment, "TRITON_CACHE_DIR": str(where)},
            capture_output=True,
            text=True,
        )
        assert f"{expected} counted" in done.stdout, done.stderr
        if what == "fill":
            # As if it had come from another machine.
            archive = shutil.make_archive(str(tmp_path / "brought"), "gztar", filled)
            shutil.rmtree(filled)
            filled = archive
