"""Quantiles of times, and the ring of inputs that keeps them out of the cache."""

import torch

from lowrank_kernels import measure


def test_quantiles_and_ring():
    assert measure.quantiles(range(10)) == (2, 5, 8) and measure.quantiles([4.0]) == (4.0, 4.0, 4.0)
    assert measure.ring_length(10**12) == 2 and measure.ring_length(1) == 64
    values = measure.ring(torch.arange(3.0), 3)
    assert len({v.data_ptr() for v in values}) == 3 and all(
        torch.equal(v, values[0]) for v in values
    )
