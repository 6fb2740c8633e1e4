"""The word embedding as two factors: a table of codes (tokens, rank) and one projection up to the width.

In a compressed small encoder the word embedding is most of what is left. Its rows E_t are approximated under

    loss = sum_t f_t (E_t - E_hat_t) M (E_t - E_hat_t)^T,        E_hat_t = c_t up^T + mean

with f_t the frequency of token t that the calibration text lets expect of other text (``expected_frequency``) and
M = E[g g^T], g = dLoss/d(embedding), shrunk: what the model makes of an error there. With mean = sum_t f_t E_t, C the
rows' covariance under f and M = L L^T, the minimum is up = L^-T U_r and c_t = (E_t - mean) L U_r, U_r the leading
eigenvectors of L^T C L. It is the two-sided loss of the other methods with tokens in place of inputs, and in their
unit: a mean over tokens of (g^T error)^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.embedding import LowRankEmbedding
from ..statistics import EmbeddingStatistics
from .linalg import balanced, shrunk

# Share of the mean diagonal that M is drawn to. What is cut lies where M is small, and a few sentences have most of
# the gradients, so M is trusted less than it is in the encoder.
SHRINKAGE = 0.5
# Rows that are in float64 at a time: multilingual tables have a quarter of a million.
ROWS = 2**14


@dataclass(frozen=True)
class FactoredTable:
    """The best factors of one embedding at every rank: ``frequency`` (tokens,), ``mean`` (width,), ``factor`` L and
    ``vectors`` U (width, width), ``values`` (width,) falling, what each of them saves of the loss, all float64;
    ``energy`` is E|E_t|^2 under f."""

    embedding: nn.Embedding
    frequency: Tensor
    mean: Tensor
    factor: Tensor
    values: Tensor
    vectors: Tensor
    energy: float

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Embedding, statistics: EmbeddingStatistics) -> FactoredTable:
        """Solve the problem above.

        Raises:
            UserError: the statistics are of another vocabulary or width.
        """
        shape = len(statistics.counts), len(statistics.gradients)
        if shape != tuple(embedding.weight.shape):
            raise UserError(
                f"the embedding's statistics are of {shape[0]}x{shape[1]} but it is {tuple(embedding.weight.shape)}; "
                "collect them again for this model"
            )
        device = embedding.weight.device
        frequency = expected_frequency(statistics.counts).to(device)
        energy, mean = 0.0, torch.zeros(shape[1], dtype=torch.float64, device=device)
        covariance = torch.zeros(shape[1], shape[1], dtype=torch.float64, device=device)
        for rows, part in _chunks(embedding.weight, frequency):
            mean += part @ rows
            energy += float(part @ rows.square().sum(1))
        for rows, part in _chunks(embedding.weight, frequency):
            rows -= mean
            covariance += (rows * part[:, None]).T @ rows
        factor = torch.linalg.cholesky(shrunk(statistics.gradients.to(device), SHRINKAGE))
        values, vectors = torch.linalg.eigh(factor.T @ covariance @ factor)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        return cls(embedding, frequency, mean, factor, values, vectors, energy)

    @property
    def kept(self) -> Tensor:
        """(width + 1,): the share of E|E_t|^2 that is left at every rank from 0 to full."""
        basis = torch.linalg.solve_triangular(self.factor.T, self.vectors, upper=True)
        return 1 - _tails(self.values * basis.square().sum(0)) / max(self.energy, 1e-300)

    @property
    def losses(self) -> Tensor:
        """(width + 1,): what is expected of the best factors of every rank from 0 to full, on the CPU.

        A normalisation follows the embedding in every family: what is cut leaves less to divide by, so that the error
        becomes larger by as much. It is the loss above over ``kept``.
        """
        return (_tails(self.values) / self.kept.clamp_min(1e-3)).cpu()

    @torch.no_grad()
    def layer(self, rank: int) -> LowRankEmbedding:
        """The best embedding of ``rank``, on the device and in the dtype of the dense one."""
        dense, leading = self.embedding, self.vectors[:, :rank]
        up = torch.linalg.solve_triangular(self.factor.T, leading, upper=True)
        codes = torch.cat(
            [
                (rows - self.mean) @ (self.factor @ leading)
                for rows, _ in _chunks(dense.weight, self.frequency)
            ]
        )
        # Balanced over the tokens as they occur.
        root = self.frequency.sqrt()[:, None]
        codes, up = balanced((codes * root).T, up)
        layer = nn.utils.skip_init(
            LowRankEmbedding,
            *dense.weight.shape,
            rank,
            dense.padding_idx,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        layer.codes.copy_(codes.T / root)
        layer.up.copy_(up)
        layer.bias.copy_(self.mean)
        return layer.train(dense.training)


def _tails(values: Tensor) -> Tensor:
    """(n + 1,): the sums of values (n,) from each one on."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def expected_frequency(counts: Tensor) -> Tensor:
    """How often each token is to be expected in other text, from ``counts`` (tokens,) in the calibration text.

    All tokens that it lacks are together as frequent as those that it has once (Good, 1953), but none of them is more
    frequent than one of those.

    >>> expected_frequency(torch.tensor([6.0, 1.0, 0.0]))
    tensor([0.7500, 0.1250, 0.1250])
    """
    absent, total = counts == 0, float(counts.sum().clamp_min(1))
    lacking, once = int(absent.sum()), int((counts == 1).sum())
    share = min(max(once, 1) / total, lacking / (total + lacking))
    expected = counts * ((1 - share) / total)
    expected[absent] = share / max(lacking, 1)
    return expected / expected.sum()


def _chunks(weight: Tensor, frequency: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the table in float64, with how often each occurs."""
    for rows, part in zip(weight.split(ROWS), frequency.split(ROWS), strict=True):
        yield rows.to(torch.float64, copy=True), part
