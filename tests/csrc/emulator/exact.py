"""Results in float64 with a bound on what float32 sums may be off by; none may be off from an infinity."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, ndtr

from .formats import Format

FLOAT32 = 2.0**-24  # half a unit in the last place
DEPTH = 16  # what one product sums before it rounds
SLOPE = 1.13  # of GELU at its steepest
# The activations' own error: a few roundings, of numbers of the size of the argument.
ACTIVATION = 16 * FLOAT32


def fit_error(weighted: np.ndarray) -> np.ndarray:
    """What a GELU may be off by, given |gelu(-|z|)|: half of what rounding that may change, see fit_activations."""
    return np.minimum(np.maximum(2.0**-12 * weighted, 2.0**-25), 2.0**-9 * weighted)


class Bounded:
    """Numbers, and what a computed number may differ from each by."""

    def __init__(self, value: np.ndarray, error: np.ndarray | float = 0.0) -> None:
        self.value, self.error = value, np.broadcast_to(error, value.shape)

    def times(self, weight: np.ndarray) -> Bounded:
        """``self @ weight.T``, summed in float32 with a rounding every 16 terms."""
        roundings = -(-weight.shape[1] // DEPTH) + 1
        size = (np.abs(self.value) + self.error) @ np.abs(weight).T
        error = self.error @ np.abs(weight).T + roundings * FLOAT32 * size
        return Bounded(self.value @ weight.T, error)

    def plus(self, bias: np.ndarray) -> Bounded:
        value = self.value + bias
        error = self.error + FLOAT32 * (np.abs(value) + self.error)
        return Bounded(value, np.where(np.isfinite(value), error, 0))

    def rounded(self, format_: Format) -> Bounded:
        """Exact where no tie is within the error."""
        value = format_.round(self.value)
        with np.errstate(invalid="ignore"):
            above = format_.round(self.value + self.error) - value
            below = value - format_.round(self.value - self.error)
        return Bounded(value, np.where(np.isfinite(value), np.maximum(above, below), 0))


def activate(name: str, z: Bounded) -> Bounded:
    x = z.value
    if name == "none":
        return z
    if name == "relu":
        return Bounded(np.maximum(x, 0), z.error)
    at_limit = np.isinf(x)
    x = np.where(at_limit, 0, x)
    if name == "gelu":
        value = x * ndtr(x)
    else:
        value = x * expit(2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
    limit = np.maximum(z.value, 0)
    error = SLOPE * z.error + ACTIVATION * np.abs(x) + fit_error(np.maximum(x, 0) - value)
    return Bounded(np.where(at_limit, limit, value), error)
