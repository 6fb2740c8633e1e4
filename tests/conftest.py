"""What libraries read from the environment when they are imported, before any test imports them.

No test reaches the network. Where there is no GPU, the kernels run in Triton's interpreter.
"""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """What is imported by now stays. The main job collects garbage after every stage, and need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
