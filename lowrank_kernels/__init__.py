"""Low-rank linear operators: ``y = act(x @ down.T @ up.T + bias)`` and its relatives, fused where that pays.

Importing this package needs only torch: no GPU is touched and Triton is imported on the first fused call.
"""

from .backends import Backend, backend_names, register_backend
from .dispatch import explain_backend, use_backend
from .linear import lowrank_linear
from .modules import LowRankLinear

__all__ = [
    "Backend",
    "LowRankLinear",
    "backend_names",
    "explain_backend",
    "lowrank_linear",
    "register_backend",
    "use_backend",
]
