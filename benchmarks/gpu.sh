#!/bin/sh
# One command for a GPU machine: install, check correctness on the GPU, tune, measure, and make the tables.
# It stops at the first failure, so nothing is tuned or measured with kernels that are not right.
#   sh benchmarks/gpu.sh            (set PYTHON to choose an interpreter whose torch sees the GPU)
# The CUDA kernels are built where there is an nvcc. Without a network, put the build requirements into that interpreter's
# environment and set PIP_NO_BUILD_ISOLATION=0, which is pip's way of saying --no-build-isolation.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")'
"$PYTHON" -m pip install --no-deps -e .
"$PYTHON" -m lowrank_kernels.env
"$PYTHON" -m pytest -q tests/lowrank_kernels
"$PYTHON" -m tests.robustness.operators --device cuda --minutes 20
# Races, stray accesses and barriers misused in the CUDA kernels, at sizes that the sanitizer gets through.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$PYTHON" -m pytest -q -x tests/lowrank_kernels/test_cuda_gpu.py -k small
    "$PYTHON" -m tests.robustness.operators --device cuda --sanitizer "$tool" --backends triton cuda --calls 200 --minutes 10 \
      --name "operators-$tool"
  done
else
  echo "compute-sanitizer is not on PATH: its three checks were left out" >&2
fi
"$PYTHON" -m lowrank_kernels.tune
"$PYTHON" -m benchmarks.operators
"$PYTHON" -m benchmarks.bert --device cuda
"$PYTHON" -m benchmarks.reporting.tables
