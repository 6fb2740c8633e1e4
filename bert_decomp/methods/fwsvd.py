"""``fwsvd``: Fisher-weighted SVD (arXiv 2207.00112): input features count by the Fisher information of their weights.

The publication takes gradients of the labels' loss; here they are label-free, as all gradients of this package are.
"""

from __future__ import annotations

from ..statistics import LayerStatistics, collected
from .base import Method, register_method
from .linalg import Metric, ridged


def metric(statistics: LayerStatistics) -> Metric:
    """W D is cut, D = diag(I)^(1/2), so S = D^2 = diag(I), I the Fisher information summed over output features."""
    return Metric(inputs=ridged(collected(statistics.fisher).diag()))


register_method("fwsvd", Method(metric, needs=("fisher",)))
