"""Low-rank linear operators: ``y = act(x @ down.T @ up.T + bias)`` and its relatives, fused where that pays.

Importing this package needs only torch: no GPU is touched and Triton is imported on the first fused call.
"""

from .alignment import align_factors
from .backends import Backend, backend_names, register_backend
from .cuda_backend.support import CUDA
from .dispatch import explain_backend, use_backend
from .modules import LowRankLinear
from .operators.ffn import lowrank_ffn
from .operators.linear import lowrank_linear
from .operators.linear_norm import lowrank_linear_norm
from .operators.qkv import lowrank_qkv
from .problem import Problem
from .reference.support import DENSE, STACKED, TORCH
from .triton_backend.support import TRITON

for _backend in (TORCH, DENSE, STACKED, TRITON, CUDA):
    register_backend(_backend)

__all__ = [
    "Backend",
    "LowRankLinear",
    "Problem",
    "align_factors",
    "backend_names",
    "explain_backend",
    "lowrank_ffn",
    "lowrank_linear",
    "lowrank_linear_norm",
    "lowrank_qkv",
    "register_backend",
    "use_backend",
]
