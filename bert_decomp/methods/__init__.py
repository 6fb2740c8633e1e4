"""Decomposition methods: one file each, registered under the name that options, tests and tables use.

Every method here is the best rank-r approximation of a weight under a loss of one form,

    loss(W_hat) = tr(G (W - W_hat) S (W - W_hat)^T),        b' = b + (W - W_hat) mu

and says only which ``S`` (how inputs vary), ``G`` (how much outputs matter) and ``mu`` it takes from the statistics.
``linalg.solve`` finds it, working on the smaller side of the weight, whose eigendecomposition is what costs.
"""

# The methods' files register themselves when they are imported.
from . import asvd, coupled, fwsvd, kfac, svd, whiten
from .base import METHODS, Drift, Method, check_width, factored_linear, get_method, register_method
from .linalg import Metric, balanced, cholesky, ridged, shrunk, solve

__all__ = [
    "METHODS",
    "Drift",
    "Method",
    "Metric",
    "asvd",
    "balanced",
    "check_width",
    "cholesky",
    "coupled",
    "factored_linear",
    "fwsvd",
    "get_method",
    "kfac",
    "register_method",
    "ridged",
    "shrunk",
    "solve",
    "svd",
    "whiten",
]
