"""How a token's gradient is kept from deciding alone, and models that are only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

# Bounds on a token's gradient norm, relative to the batch's mean (LEMS, ICML 2026): no token decides alone, none is
# lost.
CLIP = (0.1, 10.0)
TEMPERATURE = 2.0


def clipped_norms(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows (tokens, m): their norms (tokens,), and the same clipped to ``CLIP`` of their mean."""
    norms = gradients.norm(dim=1)
    mean = norms.mean().clamp_min(1e-30)
    return norms, norms.clamp(CLIP[0] * mean, CLIP[1] * mean)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients of parameters; afterwards as it was."""
    was_training = model.training
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(was_training)
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
