"""``coupled``: like ``kfac``, but the inputs are those of the tokens that matter.

E (g^T D x)^2, D = W - W_hat, is E[|g|^2 (u^T D x)^2] with u the direction of g: a token's input counts as much as the
loss cares about that token. Taking the factors apart as E[g g^T] and Cov(x) forgets it; here S is the covariance of x
weighted by |g|^2 (clipped as all gradients are), the first step of the power iteration towards the nearest Kronecker
product (Van Loan and Pitsianis, 1993). Further steps were tried and lose: they weigh ever fewer tokens. In a classifier
the weights matter most in the last layer, where only the first token's outputs are ever read, and G helps for query
and key as well.
"""

from __future__ import annotations

from ..statistics import LayerStatistics, collected
from .base import Method, register_method
from .kfac import SHRINK_INPUTS, SHRINK_OUTPUTS
from .linalg import Metric, shrunk


def metric(statistics: LayerStatistics) -> Metric:
    """S = Cov(x) weighted by |g|^2 and G = E[g g^T], both shrunk; mu is the mean under the same weights."""
    gradients = collected(statistics.gradients)
    return Metric(
        shrunk(gradients.input_covariance, SHRINK_INPUTS),
        shrunk(gradients.relative_second_moment, SHRINK_OUTPUTS),
        gradients.input_mean,
    )


register_method(
    "coupled", Method(metric, needs=("gradients",), anchor="gradients", shrink=SHRINK_INPUTS)
)
