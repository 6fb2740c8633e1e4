"""Two processes on the CPU (gloo) share one run: the same training as one process with batches twice as large, also
after all of them were killed in the middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from safetensors.torch import load_file
from tiny_models import write_csv

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from tests.robustness.job import Forked


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


class Ranks:
    """The same in two processes of a fork server, which have imported everything: what the launcher does, for less."""

    def __init__(self, line):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        self.errors, self.processes = [], []
        for rank in ("0", "1"):
            self.errors.append(tempfile.NamedTemporaryFile("r+"))  # noqa: SIM115
            variables = {**together, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
            self.processes.append(Forked(line, self.errors[-1], self.errors[-1], variables))

    def finish(self):
        codes = [process.wait(300) for process in self.processes]
        assert codes == [0, 0], [file.read()[-2000:] for file in self.errors]

    def kill_after(self, path):
        """SIGKILL to both as soon as ``path`` is there; neither may have come to its end."""
        while not path.exists():
            assert self.processes[0].poll() is None, [file.read()[-2000:] for file in self.errors]
            time.sleep(0.005)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        assert [process.wait(60) for process in self.processes] == [-signal.SIGKILL] * 2
        assert not (path.parents[2] / "model").exists(), "killed too late"


def job(tmp_path, encoder_folder, rows, **changes):
    """The arguments of a run on ``rows`` of training text, in order, so that its batches are known."""
    write_csv(tmp_path / "train.csv", rows, 1)
    write_csv(tmp_path / "dev.csv", 20, 2)
    options = {
        "model_name_or_path": encoder_folder,
        "train_file": tmp_path / "train.csv",
        "validation_file": tmp_path / "dev.csv",
        "cache_dir": tmp_path / "cache",
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "measure_batch_sizes": 1,
        "measure_seconds": 0.01,
        "disable_tqdm": True,
        **changes,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path, encoder_folder):
    """The two fine-tune the teacher together, one of them decomposes it, and the single process takes both over.

    Logits and task are means over examples, so both ways take the same steps up to rounding. Feature terms are
    divided by the variance of each process's own batch, which is why they may differ by a tenth."""
    line = job(
        tmp_path,
        encoder_folder,
        96,
        teacher_num_train_epochs=2,
        teacher_learning_rate=3e-3,
        encoder_fraction=0.3,
        num_train_epochs=2,
        logging_steps=1,
        save_steps=5,
        eval_strategy="epoch",
        distillation_terms="logits=1,task=1,hidden=1e-9,attention_probabilities=1e-9",
    )

    def two(name):
        return [*line, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / name)]

    said = finished(launch(two("two")))
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
    Ranks(two("killed")).kill_after(checkpoint)
    Ranks(two("killed")).finish()
    resumed = load_file(tmp_path / "killed" / "model" / "model.safetensors")
    assert all(resumed[name].equal(value) for name, value in weights["two"].items())


@pytest.mark.slow
@pytest.mark.parametrize("units", ["matrices", "structured"])
def test_two_processes_train_several_sizes_as_one(units, tmp_path, encoder_folder):
    line = job(
        tmp_path,
        encoder_folder,
        32,
        teacher_num_train_epochs=1,
        num_train_epochs=1,
        units=units,
        distillation_terms="logits=1,task=1",
    )
    line += ["--nested_fractions", "0.6", "0.25"]
    two = ["--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "two")]
    one = ["--per_device_train_batch_size", "16", "--output_dir", str(tmp_path / "one")]
    Ranks([*line, *two]).finish()
    assert command(main, [*line, *one]) == 0
    weights, expected = (
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("two", "one")
    )
    assert any(name.endswith("biases") for name in weights)
    for name, value in weights.items():
        assert bool(((value - expected[name]).abs() < 1e-3).all()), name
