"""The main job from a bare encoder and a CSV file: whole, repeated, killed and resumed, and with everything wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
from cases import arguments
from safetensors.torch import load_file
from tiny_models import write_csv

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main, parse
from bert_decomp.cli.report import main as report_main
from bert_decomp.errors import UserError
from bert_decomp.models.loading import load_model
from bert_decomp.pipeline.run_folder import STAGES
from tests.robustness.job import Job
from tests.robustness.kill import Stop, chain, compare


@pytest.mark.slow
def test_the_whole_job_then_again_then_over_another(data, encoder_folder, capsys):
    line = arguments(data, encoder_folder, fused=True)
    assert command(main, line) == 0
    printed = capsys.readouterr().out
    assert "Fused operators: backend torch, because" in printed and "report:" in printed
    results = json.loads((data / "run" / "results.json").read_text())
    assert set(results["metrics"]) == {"teacher", "decomposed", "distilled"}
    assert results["metrics"]["teacher"]["accuracy"] > 0.9
    assert {row["form"] for row in results["timings"]["rows"]} == {
        "dense",
        "low-rank, unfused",
        "low-rank, fused",
    }
    assert (
        results["environment"]["torch"]
        and results["options"]["seed"] == 42
        and results["task"]["fingerprint"]
    )
    student = results["parameters"]["student"]
    model = load_model(str(data / "run" / "model"))
    assert student["whole"] == sum(p.numel() for p in model.parameters())
    assert model.config.id2label == {0: "coloured", 1: "plain"}
    assert not (data / "run" / "checkpoints").exists() and not list(data.rglob(".partial-*"))

    page = (data / "run" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", ""), "the page must stand alone"
    for start in range(page.count("<svg")):
        piece = "<svg" + page.split("<svg")[start + 1].split("</svg>")[0] + "</svg>"
        ElementTree.fromstring(piece)
    os.remove(data / "run" / "report.html")
    assert command(report_main, [str(data / "run" / "results.json")]) == 0
    assert (data / "run" / "report.html").read_text() == page

    capsys.readouterr()
    before = (data / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert command(main, line) == 0
    assert "distil: done before" in capsys.readouterr().out
    assert (data / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert command(main, arguments(data, encoder_folder, fused=True, rank=9)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (
        command(
            main, arguments(data, encoder_folder, fused=True, rank=9, overwrite_output_dir=True)
        )
        == 0
    )
    assert (
        load_model(str(data / "run" / "model")).bert.encoder.layer[0].intermediate.dense.rank == 9
    )


@pytest.mark.slow
def test_sizes_by_quality_by_latency_and_by_an_earlier_plan(data, encoder_folder, capsys):
    """Each is one option; a latency that the dense model meets has nothing to compress."""
    line = arguments(data, encoder_folder, "quality", method="svd", max_drop=40, rank=None)
    assert command(main, line) == 0
    plan = json.loads((data / "quality" / "plan.json").read_text())
    assert plan["encoder_fraction"] < 1
    file = data / "quality" / "plan.json"
    assert (
        command(
            main, arguments(data, encoder_folder, "again", method="svd", plan_file=file, rank=None)
        )
        == 0
    )
    assert json.loads((data / "again" / "plan.json").read_text()) == plan
    capsys.readouterr()
    slow = {"method": "svd", "latency_ms": 1e6, "rank": None}
    assert command(main, arguments(data, encoder_folder, "long", **slow)) == 2
    assert "the model takes 40 at most" in capsys.readouterr().err
    assert (
        command(main, arguments(data, encoder_folder, "slow", latency_seq_length=16, **slow)) == 2
    )
    assert "what the dense model takes" in capsys.readouterr().err
    assert (
        command(
            main,
            arguments(
                data, encoder_folder, "both", method="svd", latency_ms=5, max_drop=1, rank=None
            ),
        )
        == 2
    )
    assert "--latency_ms and --max_drop both set the size" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_to_the_bit_and_another_does_not(data, encoder_folder):
    models = []
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert (
            command(
                main,
                arguments(
                    data,
                    encoder_folder,
                    out,
                    seed=seed,
                    cache_dir=data / f"cache-{out}",
                    teacher_num_train_epochs=1,
                    num_train_epochs=1,
                ),
            )
            == 0
        )
        models.append(load_file(data / out / "model" / "model.safetensors"))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert not all(torch.equal(value, models[2][name]) for name, value in models[0].items())


@pytest.mark.slow
def test_a_fine_tuned_classifier_is_its_own_teacher(data, encoder_folder, capsys):
    assert command(main, arguments(data, encoder_folder)) == 0
    (teacher,) = (data / "cache" / "teachers").glob(f"{data.name}-*")
    assert command(main, arguments(data, teacher, "second", teacher_num_train_epochs=99)) == 0
    first, second = (
        json.loads((data / out / "results.json").read_text()) for out in ("run", "second")
    )
    assert first["metrics"] == second["metrics"]
    write_csv(data / "train.csv", 20)
    text = (data / "train.csv").read_text().replace("coloured", "painted")
    (data / "train.csv").write_text(text)
    capsys.readouterr()
    assert command(main, arguments(data, teacher, "third", validation_file=None)) == 2
    assert "labels that the model lacks: painted" in capsys.readouterr().err


def start(line):
    return subprocess.Popen(
        [sys.executable, "-m", "bert_decomp.run", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(folder, pattern, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_several_moments_it_goes_on_to_the_same_model(data, encoder_folder):
    """The short form of tests/robustness/kill.py.

    In the teacher's training, before the factors, in the middle of writing a checkpoint, after a whole one, and by
    SIGTERM before the model is saved.
    """
    line = arguments(data, encoder_folder)
    options = {
        name.removeprefix("--"): value for name, value in zip(line[::2], line[1::2], strict=True)
    }
    whole, cut = Job(data / "whole", options), Job(data / "cut", options)
    assert whole.start(warm=True).wait() == 0
    stops = [
        Stop(stage, None, file, 0.0, name)
        for stage, file, name in (
            ("teacher", "cache/teachers/*-training/checkpoint-*", "SIGKILL"),
            ("statistics", "run/statistics.safetensors", "SIGKILL"),
            ("distil", "run/checkpoints/checkpoint-*/optimizer.pt", "SIGKILL"),
            ("distil", "run/checkpoints/checkpoint-*/files.json", "SIGKILL"),
            ("distil", "run/distillation_log.json", "SIGTERM"),
        )
    ]
    assert chain(cut, stops, dict.fromkeys(STAGES, 1.0), warm=True) == []
    assert sum(stop.hit is not None for stop in stops) >= 4
    assert compare(cut, whole.result()) == []


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_exit_code_2(data, encoder_folder):
    process = start(arguments(data, encoder_folder, num_train_epochs=500))
    wait_for(data, "run/checkpoints/checkpoint-*", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 2
    assert (
        error.strip().splitlines()[-1].startswith("error: interrupted") and "Traceback" not in error
    )


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"rank": 0}, "smallest is 1"),
        ({"rank": -2}, "smallest is 1"),
        ({"rank": 500}, "largest that compresses"),
        ({"encoder_fraction": 1.5}, "between 0 and 1"),
        ({"rank": 3, "encoder_fraction": 0.5}, "give one"),
        ({"method": "magic"}, "unknown method"),
        ({"task_name": "questions"}, "two sources"),
        ({"train_file": "none.csv"}, "no such file"),
        ({"label_column_name": "klass"}, "no column 'klass'"),
        ({"model_name_or_path": "no-such-model-anywhere"}, "cannot load"),
        ({"distillation_terms": "hiden=1"}, "unknown distill"),
        ({"distillation_terms": "hidden"}, "name=weight"),
        ({"measure_batch_sizes": "0"}, "not a list like"),
        ({"max_train_samples": 0}, "max_train_samples"),
        ({"max_seq_length": 1}, "at least 3"),
        ({"seed": "x"}, "invalid"),
        ({"no_such_option": 1}, "unknown options"),
        ({"whole_parameters": 0.5}, "--whole_parameters is now called --model_fraction"),
        ({"pareto_parameters": "0.5"}, "--pareto_parameters is now called --pareto_fractions"),
        ({"exclude": "*"}, "no encoder matrix"),
    ],
)
def test_bad_requests_are_one_line_code_2_and_leave_nothing(
    data, encoder_folder, capsys, changes, word
):
    try:
        code = command(main, arguments(data, encoder_folder, **changes))
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and word in error and error.count("\n") == 1, error
    assert not (data / "run").exists() and not (data / "cache").exists()


def test_output_folders_that_are_not_a_runs_are_left_alone(data, encoder_folder, capsys):
    (data / "run").mkdir()
    (data / "run" / "thesis.txt").write_text("years of work")
    for extra in ({}, {"overwrite_output_dir": True}):
        assert command(main, arguments(data, encoder_folder, **extra)) == 2
        assert "something else than a run" in capsys.readouterr().err
    assert (data / "run" / "thesis.txt").read_text() == "years of work"
    assert command(main, arguments(data, encoder_folder, out="train.csv")) == 2
    assert command(main, arguments(data, encoder_folder, out="train.csv/below")) == 2


def test_a_file_of_options_is_the_same_as_the_options(data, encoder_folder):
    line = arguments(data, encoder_folder)
    values = {
        name.removeprefix("--"): value for name, value in zip(line[::2], line[1::2], strict=True)
    }
    for number in (
        "teacher_num_train_epochs",
        "num_train_epochs",
        "save_steps",
        "measure_seq_length",
        "per_device_train_batch_size",
    ):
        values[number] = int(values[number])
    for number in ("teacher_learning_rate", "learning_rate", "measure_seconds"):
        values[number] = float(values[number])
    values["disable_tqdm"] = values["use_cpu"] = True
    (data / "options.json").write_text(json.dumps(values))
    (data / "options.yaml").write_text(
        "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
    )
    expected = parse(line).as_dict()
    for file in ("options.json", "options.yaml"):
        assert parse([str(data / file)]).as_dict() == expected
    for name, text in (
        ("bad.yaml", "a: ["),
        ("bad.json", "{"),
        ("list.json", "[]"),
        ("unknown.json", '{"rnk": 3}'),
    ):
        (data / name).write_text(text)
        with pytest.raises(UserError):
            parse([str(data / name)])
    with pytest.raises(UserError, match="cannot read"):
        parse([str(data / "none.yaml")])


def test_a_model_made_for_the_report_lacks_nothing_or_says_so(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"options": {}}')
    assert command(report_main, [str(tmp_path / "results.json")]) == 2
    assert "lack a part" in capsys.readouterr().err
