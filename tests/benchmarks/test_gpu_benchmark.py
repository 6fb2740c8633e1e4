"""The benchmark for GPUs, rehearsed: every stage at toy sizes in Triton's interpreter, and the limits of a stage."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correct, encoders, micro, training
from benchmarks.gpu.results import TOY, Results, Setting

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for a CPU")


@pytest.fixture
def setting(tmp_path):
    """Smaller than a rehearsal by the command, whose stages are the same."""
    sizes = {**TOY, "points": ("2x4",), "width": 32, "neurons": 48}
    results = Results(tmp_path / command.RESULTS)
    return Setting(results, time.time() + 600, **sizes)


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
    assert found["calibration"]["seconds"] > 0 and "48 %, triton" in found["training"]["ms"]
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
    assert sum(command.STAGES[name].seconds for name in rehearsed) < 14 * 60
    with pytest.raises(SystemExit):
        command.main(["no-such-stage"])
