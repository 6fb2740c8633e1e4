"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.

On a GPU no test calibrates, and what this machine's user has measured must not decide what the tests run.
"""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["LOWRANK_KERNELS_CALIBRATE"] = "0"
os.environ["LOWRANK_KERNELS_CACHE"] = str(Path(__file__).parent / "no-cache")
