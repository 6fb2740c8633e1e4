"""The polynomials of csrc/activation.cuh: ``python -m tests.csrc.fit_activations``.

gelu(z) = max(z, 0) - |z| w(|z|), and log2 w is smooth. It is fitted in the weighted minimax sense by a linear program.
The weight is half of what rounding gelu(-x) may change, in float16 or bfloat16, whichever rounds less: a result has
then at most twice the error of the exact one rounded.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.special import log_expit, log_ndtr

POINTS = 1500
# float16's relative rounding, or its smallest step; below that, bfloat16's.
FLOAT16, STEP, BFLOAT16 = 2.0**-12, 2.0**-25, 2.0**-9


def gelu_tail(x: np.ndarray) -> np.ndarray:
    return log_ndtr(-x) / np.log(2)


def gelu_tanh_tail(x: np.ndarray) -> np.ndarray:
    return log_expit(-2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)) / np.log(2)


# Name, function, where the fit ends (results there are 1e-18 and 1e-11), degree.
FITS = (("kGeluTail", gelu_tail, 9.0, 6), ("kGeluTanhTail", gelu_tanh_tail, 6.0, 7))


def fit(function, end: float, degree: int) -> tuple[np.ndarray, float]:
    """The coefficients, from the constant term on, and the largest share of the weight that their error takes."""
    x = (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2 * end
    exact = function(x)
    result = np.maximum(x * 2.0**exact, 1e-300)
    weight = np.minimum(np.maximum(FLOAT16, STEP / result), BFLOAT16) / np.log(2)
    terms = np.vander(x / end, degree + 1, increasing=True) / weight[:, None]
    bound = np.full((POINTS, 1), -1.0)
    solution = linprog(
        [0.0] * (degree + 1) + [1.0],
        A_ub=np.block([[terms, bound], [-terms, bound]]),
        b_ub=np.concatenate([exact / weight, -exact / weight]),
        bounds=[(None, None)] * (degree + 1) + [(0, None)],
        method="highs",
    ).x
    return np.float32(solution[:-1] / end ** np.arange(degree + 1)), float(solution[-1])


if __name__ == "__main__":
    for name, function, end, degree in FITS:
        coefficients, share = fit(function, end, degree)
        print(
            f"{name} ({share:.2f} of the weight): {', '.join(f'{c!r}f' for c in coefficients.tolist())}"
        )
