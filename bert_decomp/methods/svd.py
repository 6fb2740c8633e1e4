"""``svd``: the best rank-r approximation of the weight itself (Eckart and Young, 1936), as the paper uses it."""

from __future__ import annotations

from ..statistics import LayerStatistics
from .base import Method, register_method
from .linalg import Metric


def metric(statistics: LayerStatistics) -> Metric:
    """S = I, G = I; statistics are not used."""
    return Metric()


register_method("svd", Method(metric))
