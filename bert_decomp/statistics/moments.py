"""What is known of one layer: moments of its inputs and of the gradients at its outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass
class InputStatistics:
    """Of one tensor x that enters linear layers, over ``tokens`` tokens, float64: ``second_moment`` E[x x^T] (n, n),
    ``mean`` E[x] (n,), ``abs_mean`` E|x| (n,)."""

    second_moment: Tensor
    mean: Tensor
    abs_mean: Tensor
    tokens: int

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T."""
        return self.second_moment - torch.outer(self.mean, self.mean)


@dataclass
class GradientStatistics:
    """Of g = dLoss/dy, y the layer's output before anything else, and of how g goes with the input x, float64.

    ``second_moment`` E[g g^T] (m, m) with clipped norms, ``energy`` E|g|^2 without clipping; ``input_second_moment``
    E[|g|^2 x x^T] / E|g|^2 (n, n) and ``input_mean`` (n,): the inputs of the tokens that matter, with the clipped
    norms. ``tokens`` is None where a file does not tell. ``token_weights`` (tokens,) has the clipped |g|^2 of every
    token, in the order of the batches; None in files of before it was kept.
    """

    second_moment: Tensor
    energy: float
    input_second_moment: Tensor
    input_mean: Tensor
    tokens: int | None = None
    token_weights: Tensor | None = None

    @property
    def relative_second_moment(self) -> Tensor:
        """E[g g^T] over its mean diagonal (the identity if no gradient reaches the layer)."""
        scale = self.second_moment.diagonal().mean()
        return (
            self.second_moment / scale
            if scale > 0
            else torch.eye(
                len(self.second_moment),
                dtype=self.second_moment.dtype,
                device=self.second_moment.device,
            )
        )

    @property
    def input_covariance(self) -> Tensor:
        """The inputs' covariance over tokens weighted by |g|^2."""
        return self.input_second_moment - torch.outer(self.input_mean, self.input_mean)


@dataclass
class LayerStatistics:
    """All that is known of the layer called ``name``; a part that was not collected is None. ``fisher`` (n,) is the
    Fisher information of the weights, E_examples[(dLoss/dW)^2], summed over output features."""

    name: str
    inputs: InputStatistics | None = None
    gradients: GradientStatistics | None = None
    fisher: Tensor | None = None

    @property
    def width(self) -> int | None:
        """Input features that the statistics are of; None if there are none."""
        if self.inputs is not None:
            return len(self.inputs.mean)
        if self.gradients is not None:
            return len(self.gradients.input_mean)
        return None if self.fisher is None else len(self.fisher)

    @property
    def tokens(self) -> int | None:
        """Tokens that the statistics are of; None if that is not known."""
        return next(
            (part.tokens for part in (self.inputs, self.gradients) if part is not None), None
        )

    def to(self, device: torch.device) -> LayerStatistics:
        """The same on another device."""

        def moved(entry: Any) -> Any:
            return entry and replace(
                entry,
                **{
                    key: value.to(device)
                    for key, value in vars(entry).items()
                    if isinstance(value, Tensor)
                },
            )

        return LayerStatistics(
            self.name,
            moved(self.inputs),
            moved(self.gradients),
            None if self.fisher is None else self.fisher.to(device),
        )


Part = TypeVar("Part")


def collected(part: Part | None) -> Part:
    """A part of a layer's statistics that ``Statistics.of`` was asked for.

    Raises:
        ValueError: it was not collected.
    """
    if part is None:
        raise ValueError("these statistics lack a part that the method needs; name it in its needs")
    return part
