"""Fixtures: one thread and one seed, a real tokenizer over a small vocabulary, a bare encoder on disk."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Jobs train on the CPU where there is a GPU, too: what these tests state of interrupted runs holds to the bit.
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer, write_csv


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def encoder_folder(tmp_path, tokenizer):
    """A bare pre-trained encoder on disk, as a user would have it."""
    folder = tmp_path / "encoder"
    model = tiny_model("bert", num_labels=2)
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    write_csv(tmp_path / "train.csv", 160, 1)
    write_csv(tmp_path / "dev.csv", 60, 2)
    return tmp_path
