"""``asvd``: activation-aware SVD (arXiv 2312.05821): input features are scaled by the root of their mean magnitude."""

from __future__ import annotations

from ..statistics import LayerStatistics, collected
from .base import Method, register_method
from .linalg import Metric, ridged


def metric(statistics: LayerStatistics) -> Metric:
    """W D is cut, D = diag(E|x|)^(1/2), so S = D^2 = diag(E|x|)."""
    return Metric(inputs=ridged(collected(statistics.inputs).abs_mean.diag()))


register_method("asvd", Method(metric, needs=("inputs",)))
