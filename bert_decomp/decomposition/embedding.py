"""The word embedding as two factors: a table of codes (tokens, rank) and one projection up to the width.

In a compressed small encoder the word embedding is most of what is left. Its rows E_t are approximated under

    loss = sum_t f_t (E_t - E_hat_t) M (E_t - E_hat_t)^T,        E_hat_t = c_t up^T + mean

with f_t the smoothed frequency of token t in the calibration text and M = E[g g^T], g = dLoss/d(embedding), shrunk:
what the model makes of an error there. With mean = sum_t f_t E_t, C the rows' covariance under f and M = L L^T, the
minimum is up = L^-T U_r and c_t = (E_t - mean) L U_r, U_r the leading eigenvectors of L^T C L. It is the two-sided loss
of ``methods`` with tokens in place of inputs.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError
from ..methods import balanced, shrunk
from ..models.embedding import LowRankEmbedding
from ..statistics import EmbeddingStatistics

# Occurrences that every token has beyond those counted: of unseen ones a tenth of one seen once.
SMOOTHING = 0.1
# Share of the mean diagonal that M is drawn to, as for the outputs of kfac.
SHRINKAGE = 0.3


@torch.no_grad()
def factor_embedding(
    embedding: nn.Embedding, statistics: EmbeddingStatistics, rank: int
) -> LowRankEmbedding:
    """The best embedding of ``rank`` under the loss above, on the device and in the dtype of ``embedding``.

    Raises:
        UserError: the statistics are of another vocabulary or width.
    """
    shape = len(statistics.counts), len(statistics.gradients)
    if shape != tuple(embedding.weight.shape):
        raise UserError(
            f"the embedding's statistics are of {shape[0]}x{shape[1]} but it is {tuple(embedding.weight.shape)}; "
            "collect them again for this model"
        )
    weight = embedding.weight.double()
    frequency = (statistics.counts + SMOOTHING).to(weight.device)
    frequency = frequency / frequency.sum()
    mean = frequency @ weight
    rows = weight - mean
    covariance = (rows * frequency[:, None]).T @ rows
    factor = torch.linalg.cholesky(shrunk(statistics.gradients.to(weight.device), SHRINKAGE))
    leading = torch.linalg.eigh(factor.T @ covariance @ factor)[1].flip(1)[:, :rank]
    # Balanced over the tokens as they occur.
    codes = (rows * frequency.sqrt()[:, None]) @ (factor @ leading)
    codes, up = balanced(codes.T, torch.linalg.solve_triangular(factor.T, leading, upper=True))
    layer = nn.utils.skip_init(
        LowRankEmbedding,
        *embedding.weight.shape,
        rank,
        embedding.padding_idx,
        device=embedding.weight.device,
        dtype=embedding.weight.dtype,
    )
    layer.codes.copy_(codes.T / frequency.sqrt()[:, None])
    layer.up.copy_(up)
    layer.bias.copy_(mean)
    return layer.train(embedding.training)
