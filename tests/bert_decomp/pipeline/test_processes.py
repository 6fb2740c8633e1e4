"""Two processes on the CPU (gloo) share one run: the same training as one process with batches twice as large, also
after all of them were killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file
from tiny_models import write_csv

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main


def launch(line):
    """The same command line in two processes."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "bert_decomp.run",
            *line,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(process):
    """What it printed; it must have ended well."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def kill_after(process, path):
    """SIGKILL to the launcher and both of its workers as soon as ``path`` is there; none may have come to its end."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    for each in (*workers, process):
        each.kill()
    process.communicate()
    psutil.wait_procs(workers)
    assert len(workers) >= 2 and process.returncode == -signal.SIGKILL
    assert not (path.parents[2] / "model").exists(), "killed too late"


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path, encoder_folder):
    """The two fine-tune the teacher together, one of them decomposes it, and the single process takes both over.

    Logits and task are means over examples, so both ways take the same steps up to rounding. Feature terms are
    divided by the variance of each process's own batch, which is why they may differ by a tenth."""
    write_csv(tmp_path / "train.csv", 96, 1)
    write_csv(tmp_path / "dev.csv", 20, 2)
    options = {
        "model_name_or_path": encoder_folder,
        "train_file": tmp_path / "train.csv",
        "cache_dir": tmp_path / "cache",
        "teacher_num_train_epochs": 2,
        "teacher_learning_rate": 3e-3,
        "encoder_fraction": 0.3,
        "validation_file": tmp_path / "dev.csv",
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_steps": 5,
        "eval_strategy": "epoch",
        "distillation_terms": "logits=1,task=1,hidden=1e-9,attention_probabilities=1e-9",
        "measure_batch_sizes": 1,
        "measure_seconds": 0.01,
        "disable_tqdm": True,
    }
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]

    def two(name):
        return launch(
            [*line, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / name)]
        )

    said = finished(two("two"))
    assert said.count("[4/7] distil") == said.count("report:") == 1, "only the first process speaks"
    assert (
        command(
            main,
            [*line, "--per_device_train_batch_size", "16", "--output_dir", str(tmp_path / "one")],
        )
        == 0
    )
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
    logs = [
        [
            entry
            for entry in json.loads((tmp_path / out / "distillation_log.json").read_text())
            if "loss" in entry
        ]
        for out in ("two", "one")
    ]
    assert len(logs[0]) == len(logs[1]) == 12
    for entry_of_two, entry_of_one in zip(*logs, strict=True):
        for name in ("loss", "loss_logits", "loss_task"):
            assert entry_of_two[name] == pytest.approx(entry_of_one[name], rel=1e-3, abs=1e-5)
        for name in ("loss_hidden", "loss_attention_probabilities"):
            assert entry_of_two[name] == pytest.approx(entry_of_one[name], rel=0.1)
    weights = {
        out: load_file(tmp_path / out / "model" / "model.safetensors") for out in ("two", "one")
    }
    for name, value in weights["two"].items():
        other = weights["one"][name]
        assert value.shape == other.shape, name
        assert bool(((value - other).abs() < 1e-3).all()), name

    checkpoint = tmp_path / "killed" / "checkpoints" / "checkpoint-5" / "trainer_state.json"
    kill_after(two("killed"), checkpoint)
    finished(two("killed"))
    resumed = load_file(tmp_path / "killed" / "model" / "model.safetensors")
    assert all(resumed[name].equal(value) for name, value in weights["two"].items())
