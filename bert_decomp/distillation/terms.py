"""The terms on the inside of the layers: what each compares, and what it is divided by.

A batch may go through the model in slices of its sentences. So a term is a sum over one slice, divided by a size of the
whole batch: the slices' values add up to that of the batch, whatever the slices are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Masks


def squared_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum of squared differences over the entries where ``mask`` holds.

    Args:
        student, teacher: any equal shape.
        mask: broadcastable to that shape; true or 1 where entries count.
    """
    # where, not a product: what stands at padding may be infinite, and 0 * inf is NaN.
    return torch.where(mask.bool(), student.float() - teacher.float(), 0.0).square().sum()


def spread(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of squared distances from the mean, of all tensors' entries where their masks hold; the parts' own sums are
    joined as by Chan, Golub and LeVeque (The American Statistician, 1983).

    Args:
        parts: tensors of any shape, each with a mask that is broadcastable to it.
    """
    sums = []
    for tensor, mask in parts:
        keep, tensor = mask.bool(), tensor.float()
        count = keep.sum() * (tensor.numel() // keep.numel())
        mean = torch.where(keep, tensor, 0.0).sum() / count.clamp_min(1)
        sums.append((count, mean, torch.where(keep, tensor - mean, 0.0).square().sum()))
    counts, means, squares = (torch.stack(values) for values in zip(*sums, strict=True))
    mean = (counts * means).sum() / counts.sum()
    total = squares.sum() + (counts * (means - mean).square()).sum()
    return torch.maximum(total, 1e-12 * counts.sum())


def attention_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of the attention probabilities: the sum over real tokens and heads.

    Args:
        student, teacher: scores (batch, heads, tokens, tokens) before the softmax over keys.
        mask: bool (batch, 1, tokens, tokens); keys that count. Rows without any are left out.
    """
    lowest = torch.finfo(torch.float32).min
    student, teacher = (
        scores.float().masked_fill(~mask, lowest).log_softmax(-1) for scores in (student, teacher)
    )
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return torch.where(mask.any(-1), divergence, 0.0).sum()


def attention_rows(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Real tokens, counted once a head: of scores and masks as ``attention_divergence`` takes them."""
    return torch.stack([mask.any(-1).sum() * scores.shape[1] for scores, mask in parts]).sum()


@dataclass(frozen=True)
class FeatureTerm:
    """A term on the inside of the layers: a difference, summed over a slice of the batch, over a size of the whole.

    Args:
        feature: what it reads.
        difference: (student's, teacher's, mask) -> scalar.
        size: of the teacher's feature and mask in each slice -> scalar.
    """

    feature: str
    difference: Callable[[Tensor, Tensor, Tensor], Tensor] = squared_error
    size: Callable[[list[tuple[Tensor, Tensor]]], Tensor] = spread

    def mask(self, masks: Masks, layer: int) -> Tensor:
        return masks.pairs(layer) if self.feature == "scores" else masks.tokens


FEATURE_TERMS: dict[str, FeatureTerm] = {
    **{name: FeatureTerm(name) for name in ("query", "key", "value")},
    "attention_scores": FeatureTerm("scores"),
    "attention_probabilities": FeatureTerm("scores", attention_divergence, attention_rows),
    **{
        name: FeatureTerm(name)
        for name in ("context", "attention_output", "ffn_intermediate", "ffn_output", "hidden")
    },
}
# Of a student with fewer or smaller heads there is no difference to take: see ``counterparts``.
WITHOUT_COUNTERPART = {"attention_scores"}
# By term and layer.
Shares = Mapping[str, Mapping[int, float]]
Sizes = Mapping[str, Mapping[int, Tensor]]


class Recorded(Protocol):
    """Features of one forward pass."""

    def get(self, name: str, layer: int) -> Tensor:
        """One feature of one layer."""


def feature_sizes(teacher: Sequence[tuple[Recorded, Masks]], terms: Shares) -> Sizes:
    """What each feature term is divided by in each layer, from the teacher's features of all slices of a batch."""
    sizes: dict[str, dict[int, Tensor]] = {name: {} for name in terms}
    for name, layers in terms.items():
        term = FEATURE_TERMS[name]
        for layer in layers:
            parts = [
                (features.get(term.feature, layer), term.mask(masks, layer))
                for features, masks in teacher
            ]
            sizes[name][layer] = term.size(parts)
    return sizes


def feature_losses(
    student: Recorded, teacher: Recorded, masks: Masks, terms: Shares, sizes: Sizes
) -> dict[str, Tensor]:
    """The unscheduled value of each feature term in a slice of a batch, given each layer's share and size."""
    losses = {}
    for name in (name for name in FEATURE_TERMS if name in terms):
        term = FEATURE_TERMS[name]
        losses[name] = torch.stack(
            [
                share
                * term.difference(
                    student.get(term.feature, layer),
                    teacher.get(term.feature, layer),
                    term.mask(masks, layer),
                )
                / sizes[name][layer]
                for layer, share in terms[name].items()
            ]
        ).sum()
    return losses
