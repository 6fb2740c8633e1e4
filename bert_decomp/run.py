"""``python -m bert_decomp.run``: the main job."""

import sys

import torch

from .cli.command import command
from .pipeline.run import main

if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(command(main))
