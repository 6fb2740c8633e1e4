#!/bin/sh
# One command for a GPU machine: install, check correctness on the GPU, tune, measure, and make the tables.
# It stops at the first failure, so nothing is tuned or measured with kernels that are not right.
#   sh benchmarks/gpu.sh            (set PYTHON to choose an interpreter whose torch sees the GPU)
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")'
"$PYTHON" -m pip install --no-build-isolation --no-deps -e .
"$PYTHON" -m lowrank_kernels.env
"$PYTHON" -m pytest -q tests/lowrank_kernels
"$PYTHON" -m lowrank_kernels.tune
"$PYTHON" benchmarks/operators.py
"$PYTHON" benchmarks/operators_report.py
