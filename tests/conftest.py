"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """What is imported by now stays. The main job collects garbage after every stage, and need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
