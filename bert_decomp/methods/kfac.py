"""``kfac``: the loss's own quadratic form, one Kronecker product a layer: outputs count as the loss cares about them.

E (g^T (W - W_hat) x)^2 over tokens, g = dLoss/dy, with the two factors G = E[g g^T] and S = Cov(x) taken apart
(LEMS, ICML 2026). Both are shrunk towards their mean diagonal, G more, since it is estimated from one draw a sentence.
Unlike the publication's, the gradients are label-free (see ``statistics``).
Query and key act only through a softmax of their product, where single gradients say little; they keep G = I.
"""

from __future__ import annotations

from ..models.architectures import FAMILIES
from ..statistics import LayerStatistics, collected
from .base import Method, register_method
from .linalg import Metric, shrunk

SHRINK_INPUTS = 0.05
SHRINK_OUTPUTS = 0.15

_QUERY_KEY = tuple(
    {
        f".{name}"
        for family in FAMILIES.values()
        for name in (family.query, family.key)
        if name != family.value
    }
)


def metric(statistics: LayerStatistics) -> Metric:
    """S and G shrunk, mu = E[x]; G has a mean diagonal of 1, which changes nothing for one layer."""
    inputs, outputs = collected(statistics.inputs), None
    if not statistics.name.endswith(_QUERY_KEY):
        gradients = collected(statistics.gradients)
        outputs = shrunk(gradients.relative_second_moment, SHRINK_OUTPUTS)
    return Metric(shrunk(inputs.covariance, SHRINK_INPUTS), outputs, inputs.mean)


register_method(
    "kfac", Method(metric, needs=("inputs", "gradients"), anchor="inputs", shrink=SHRINK_INPUTS)
)
