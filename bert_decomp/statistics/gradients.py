"""The label-free loss that gradients are taken of, and how a token's gradient is kept from deciding alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Bounds on a token's gradient norm, relative to the batch's mean (LEMS, ICML 2026): no token decides alone, none is
# lost.
CLIP = (0.1, 10.0)
TEMPERATURE = 2.0


def sampled_label_loss(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Summed over examples: cross-entropy against a class drawn from softmax(logits / temperature), whose mean outer
    gradient is the Fisher information at that temperature; for one output, the output times a random sign."""
    if logits.shape[-1] == 1:
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        return (logits * signs.to(logits.device)).sum()
    scaled = logits / temperature
    drawn = torch.multinomial(scaled.detach().softmax(-1).cpu(), 1, generator=generator).to(
        logits.device
    )
    return -scaled.log_softmax(-1).gather(-1, drawn).sum()


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
