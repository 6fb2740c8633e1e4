"""``whiten``: the best rank-r approximation of what the layer computes, E|(W - W_hat) x|^2, not of its weight.

DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (arXiv 2403.07378) reach this minimum through a factor of the second
moment and its inverse. Using the covariance instead of the second moment is right once the bias takes over the mean:
b' = b + (W - W_hat) mu (the centred form, Yu and Wu, AAAI 2023). It costs no parameter and its error is never larger.
"""

from __future__ import annotations

from ..statistics import LayerStatistics, collected
from .base import Method, register_method
from .linalg import Metric, ridged


def metric(statistics: LayerStatistics) -> Metric:
    """S = Cov(x), G = I, mu = E[x]."""
    inputs = collected(statistics.inputs)
    return Metric(inputs=ridged(inputs.covariance), mean=inputs.mean)


register_method("whiten", Method(metric, needs=("inputs",), anchor="inputs"))
