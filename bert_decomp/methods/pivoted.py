"""``pivoted``: two factors re-encoded without loss as r rows of their product and the other rows' coefficients.

Any rank-r matrix is r linearly independent rows and, for each other row, r coefficients (PIFA, ICML 2025):
r (m + n) - r^2 numbers instead of r (m + n), so at equal size rank 245 of 768x768 becomes rank 305. The outputs come in
pivoted order and are put back by one gather, and none of the fused kernels reads this form: it saves weights, not time.
"""

from __future__ import annotations

import math

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear


def pivoted_rank(out_features: int, in_features: int, rank: int) -> int:
    """The largest r whose pivoted form is no larger than plain factors of ``rank``: r (m + n) - r^2 <= rank (m + n).

    >>> pivoted_rank(768, 768, 245)
    305
    """
    total = out_features + in_features
    root = (total - math.sqrt(max(total * total - 4 * rank * total, 0))) / 2
    return min(out_features, in_features, math.floor(root + 1e-9))


class PivotedLinear(nn.Module):
    """y[pivots] = rows x, y[others] = coefficients y[pivots], plus the bias: ``rows`` (r, in), ``coefficients``
    (out - r, r), ``order`` (out,) where each output is found, ``bias`` (out,) or None."""

    def __init__(self, rows: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None):
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.coefficients = nn.Parameter(coefficients)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.order: Tensor
        self.register_buffer("order", order)

    @classmethod
    @torch.no_grad()
    def from_low_rank(cls, layer: LowRankLinear) -> PivotedLinear:
        """Re-encode ``layer``; pivots are chosen by column-pivoted QR of the product's transpose, in float64."""
        up, down = layer.up.double(), layer.down.double()
        # Rows of up @ down depend on each other as those of up R^T do, down^T = Q R: an (out, r) problem.
        triangle = torch.linalg.qr(down.T).R
        _, _, permutation = scipy.linalg.qr(
            (up @ triangle.T).T.cpu().numpy(), mode="economic", pivoting=True
        )
        permutation = torch.from_numpy(permutation).long().to(up.device)
        pivots, others = permutation[: layer.rank], permutation[layer.rank :]
        coefficients = torch.linalg.solve(up[pivots].T, up[others].T).T
        like = layer.up
        return cls(
            (up[pivots] @ down).to(like.dtype),
            coefficients.to(like.dtype),
            permutation.argsort(),
            None if layer.bias is None else layer.bias.detach().clone(),
        ).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        leading = F.linear(x, self.rows)
        y = torch.cat([leading, F.linear(leading, self.coefficients)], -1)[..., self.order]
        return y if self.bias is None else y + self.bias
