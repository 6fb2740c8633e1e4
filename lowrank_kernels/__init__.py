"""Low-rank linear operators: ``y = act(x @ down.T @ up.T + bias)`` and its relatives, fused where that pays.

Importing this package needs only torch: no GPU is touched and Triton is imported on the first fused call.
"""

from .backends import Backend, Problem, backend_names, register_backend
from .dispatch import explain_backend, use_backend
from .modules import LowRankLinear
from .operators.ffn import lowrank_ffn
from .operators.linear import lowrank_linear
from .operators.linear_norm import lowrank_linear_norm
from .operators.qkv import lowrank_qkv
from .packing import pack_factors

__all__ = [
    "Backend",
    "LowRankLinear",
    "Problem",
    "backend_names",
    "explain_backend",
    "lowrank_ffn",
    "lowrank_linear",
    "lowrank_linear_norm",
    "lowrank_qkv",
    "pack_factors",
    "register_backend",
    "use_backend",
]
