"""Two processes on the CPU (gloo) share one run: the same training as one process with batches twice as large."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_models import write_csv

from bert_decomp.command import command
from bert_decomp.run import main


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path, encoder_folder):
    """The two fine-tune the teacher together, one of them decomposes it, and the single process takes both over.

    Logits and task are means over examples, so both ways take the same steps up to rounding. Feature terms are
    divided by the variance of each process's own batch, which is why they may differ by a tenth."""
    write_csv(tmp_path / "train.csv", 96, 1)
    write_csv(tmp_path / "dev.csv", 20, 2)
    options = {"model_name_or_path": encoder_folder, "train_file": tmp_path / "train.csv", "cache_dir": tmp_path / "cache",
               "teacher_num_train_epochs": 2, "teacher_learning_rate": 3e-3, "parameters": 0.3, "validation_file": tmp_path / "dev.csv", "learning_rate": 1e-3,
               "num_train_epochs": 2, "logging_steps": 1, "train_sampling_strategy": "sequential", "use_cpu": True,
               "distillation_terms": "logits=1,task=1,hidden=1e-9,attention_probabilities=1e-9", "save_steps": 5,
               "measure_batch_sizes": 1, "measure_seconds": 0.01, "disable_tqdm": True, "eval_strategy": "epoch"}
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
                          "bert_decomp.run", *line, "--per_device_train_batch_size", "8", "--output_dir",
                          str(tmp_path / "two")], check=False, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("[4/7] distil") == two.stdout.count("report:") == 1, "only the first process speaks"
    assert command(main, [*line, "--per_device_train_batch_size", "16", "--output_dir", str(tmp_path / "one")]) == 0
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
    logs = [[entry for entry in json.loads((tmp_path / out / "distillation_log.json").read_text()) if "loss" in entry]
            for out in ("two", "one")]
    assert len(logs[0]) == len(logs[1]) == 12
    for entry_of_two, entry_of_one in zip(*logs):
        for name in ("loss", "loss_logits", "loss_task"):
            assert entry_of_two[name] == pytest.approx(entry_of_one[name], rel=1e-3, abs=1e-5)
        for name in ("loss_hidden", "loss_attention_probabilities"):
            assert entry_of_two[name] == pytest.approx(entry_of_one[name], rel=0.1)
    weights = [load_file(tmp_path / out / "model" / "model.safetensors") for out in ("two", "one")]
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-3, name
