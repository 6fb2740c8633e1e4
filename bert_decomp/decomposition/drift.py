"""The drift refit: every matrix of a layer again, on what the compressed network feeds it.

Layer by layer, with z' what enters a matrix in the compressed network, W and b are refitted by ridge regression,

    W z' + b  ~  t

A matrix that reads a layer's states aims at what it would answer to the dense network's, t = W0 z + b0. The two whose
results are added to a residual aim at the dense sum, t = y + (x - x') with x and x' the residuals: what earlier layers
lost is made up for. The ridge pulls towards the weight W0 that was there, by ``RIDGE`` times the mean variance of z'.
Tokens count by |dLoss/dy|: by its square, as in the statistics, a few of them would decide, and what fits those few
fits other texts less. Two factors are those of the refitted weight, by the covariance of z' plus the ridge, which
together are the best of their rank (reduced-rank regression, Izenman, 1975).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..kinds import model_inputs
from ..models.architectures import Family, encoder_layers
from ..models.resized import Constant
from ..planning.blocks import PARTS, BlockPlan
from ..statistics import Statistics, token_weights
from ..units import Layer, Matrix
from .structure import reduced

RIDGE = 0.05
# Parts that are refitted together, in the order of the layer.
STEPS = (("query", "key", "value"), ("attention_output",), ("ffn_intermediate",), ("ffn_output",))
# Where a part's input is recorded; query, key and value read the same.
READ = {part: "query" for part in STEPS[0]} | {"ffn_intermediate": "ffn_intermediate"}
# The module that normalises the sum of a part's result and the residual.
NORMS = {"attention_output": "attention_norm", "ffn_output": "ffn_norm"}
# What the targets of a layer are made of.
TARGETS = {*READ.values(), *(f"{part} sum" for part in NORMS)}

Call = tuple[tuple, dict[str, Any]]


class _Moments:
    """Weighted sums over tokens of inputs z and targets t, both shifted by the first batch's mean; float64."""

    def __init__(self) -> None:
        self._total = 0.0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add tokens: (tokens, n), (tokens, m), (tokens,)."""
        inputs, targets = inputs.float(), targets.float()
        if self._shifts is None:
            self._shifts = inputs.mean(0), targets.mean(0)
        inputs, targets = inputs - self._shifts[0], targets - self._shifts[1]
        weighted = inputs * weights[:, None]
        new = tuple(
            sums.double()
            for sums in (
                weighted.T @ inputs,
                weighted.T @ targets,
                weighted.sum(0),
                weights @ targets,
            )
        )
        old = self._sums or tuple(map(torch.zeros_like, new))
        self._sums = tuple(a + b for a, b in zip(old, new, strict=True))
        self._total += float(weights.sum(dtype=torch.float64))

    def refit(self, matrix: Matrix, ridge: float) -> Matrix:
        """``matrix`` with the weight and the bias that answer best, and the moments by which it may be factored.

        Raises:
            ValueError: nothing was added.
        """
        if self._shifts is None:
            raise ValueError("there are no tokens to refit to")
        second, cross, mean, target = (value / max(self._total, 1e-300) for value in self._sums)
        covariance = second - torch.outer(mean, mean)
        pull = ridge * covariance.diagonal().mean().clamp_min(1e-30)
        covariance.diagonal().add_(pull)
        weight = torch.linalg.solve(
            covariance, cross - torch.outer(mean, target) + pull * matrix.weight.T
        ).T
        mean, target = (
            shift.double() + value
            for shift, value in zip(self._shifts, (mean, target), strict=True)
        )
        return replace(
            matrix, weight=weight, bias=target - weight @ mean, inputs=covariance, mean=mean
        )


class _Reached(Exception):
    """Ends a pass through a layer once what was wanted of it is known."""


class _Recorder:
    """Runs one layer on one batch and keeps what enters and leaves its parts, real tokens only."""

    def __init__(self, family: Family):
        self._family = family

    def run(
        self, layer: nn.Module, states: Tensor, call: Call, mask: Tensor, until: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's result (or ``states``, if it ends at the part ``until``), and by part what entered it (tokens,
        n) and under "PART residual" and "PART sum" what its result was added to, and the sum."""
        seen: dict[str, Tensor] = {}
        handles = []

        def watch(part: str) -> None:
            def leaves(_module: nn.Module, args: tuple, result: Tensor) -> None:
                seen[part], seen["result"] = (x.flatten(0, -2)[mask] for x in (args[0], result))
                if part == until and part not in NORMS:
                    raise _Reached

            def adds(_module: nn.Module, args: tuple) -> None:
                total = args[0].flatten(0, -2)[mask]
                seen[f"{part} sum"], seen[f"{part} residual"] = total, total - seen["result"]
                if part == until:
                    raise _Reached

            module = layer.get_submodule(getattr(self._family, part))
            handles.append(module.register_forward_hook(leaves))
            if part in NORMS:
                norm = layer.get_submodule(getattr(self._family, NORMS[part]))
                handles.append(norm.register_forward_pre_hook(adds))

        for part in PARTS:
            watch(part)
        try:
            result = layer(states, *call[0], **call[1])
        except _Reached:
            return states, seen
        finally:
            for handle in handles:
                handle.remove()
        return result[0] if isinstance(result, tuple) else result, seen


@torch.no_grad()
def refit_(
    model: nn.Module,
    teacher: PreTrainedModel,
    layers: list[Layer],
    plan: BlockPlan,
    batches: list[dict[str, Tensor]],
    statistics: Statistics | None = None,
    *,
    ridge: float = RIDGE,
    progress: bool = True,
) -> None:
    """Refit the matrices of ``model``, in place.

    Args:
        model: ``teacher`` decomposed by ``plan``.
        teacher: the dense model.
        layers: the teacher's, as ``layers_of`` prepares them.
        batches: padded inputs; those of the statistics will do.
        statistics: of the teacher. If they are of the same batches, tokens count as they say.

    Raises:
        UserError: the layers of this architecture do not normalise after each half.
    """
    family = layers[0].family
    if family.attention_norm is None:
        raise UserError(
            f"the drift refit needs layers that normalise after each half; {teacher.config.model_type} is "
            "without: leave the refit out"
        )
    recorder, was_training = _Recorder(family), (model.training, teacher.training)
    model.eval(), teacher.eval()
    dense, low = encoder_layers(teacher), encoder_layers(model)
    linears = {
        f"{name}.{getattr(family, part)}": dense[name].get_submodule(getattr(family, part))
        for name in dense
        for part in PARTS
    }
    with torch.enable_grad():
        weights = token_weights(teacher, batches, linears, statistics, progress=progress)
    calls, states, masks = _entrance(teacher, next(iter(dense.values())), batches)
    low_states = list(states)
    for layer in tqdm(layers, desc="refit", unit="layer", disable=not progress, leave=False):
        name, matrices = layer.name, reduced(layer, plan.layers[layer.name])
        known: list[dict[str, Tensor]] = []
        for index, state in enumerate(states):
            states[index], seen = recorder.run(dense[name], state, calls[index], masks[index])
            known.append({key: seen[key] for key in TARGETS & set(seen)})
        for step in STEPS:
            parts = [part for part in step if part in matrices]
            moments = {part: _Moments() for part in parts}
            for index, state in enumerate(low_states if parts else ()):
                _, seen = recorder.run(low[name], state, calls[index], masks[index], step[-1])
                for part, sums in moments.items():
                    entering, targets = _pair(part, matrices[part], seen, known[index])
                    counts = weights[f"{name}.{getattr(family, part)}"][index].sqrt()
                    sums.add(entering, targets, counts)
            for part, sums in moments.items():
                module = low[name].get_submodule(getattr(family, part))
                _put(module, sums.refit(matrices[part], ridge))
        for index, state in enumerate(low_states):
            low_states[index], _ = recorder.run(low[name], state, calls[index], masks[index])
    model.train(was_training[0]), teacher.train(was_training[1])


def _pair(
    part: str, matrix: Matrix, seen: dict[str, Tensor], known: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What enters a matrix in the compressed network, and what it should answer."""
    # Of a sub-layer that was dropped a bias is left, which answers to nothing.
    entering = seen[part][:, : matrix.weight.shape[1]]
    if part in NORMS:
        return entering, known[f"{part} sum"] - seen[f"{part} residual"]
    return entering, known[READ[part]] @ matrix.weight.to(
        entering.dtype
    ).T + matrix.bias_or_zero.to(entering.dtype)


def _put(module: nn.Module, matrix: Matrix) -> None:
    """The refitted matrix in its module; where there is no bias, none is needed: the key's drops out of the softmax,
    and the value's is the attention output's to make up for."""
    if isinstance(module, LowRankLinear):
        down, up, bias = matrix.factors(module.rank)
        module.down.copy_(down), module.up.copy_(up)
    else:
        bias = matrix.bias_or_zero
        if isinstance(module, nn.Linear):
            module.weight.copy_(matrix.weight)
        elif not isinstance(module, Constant):
            raise TypeError(f"{type(module).__name__} is no linear layer")
    if module.bias is not None:
        module.bias.copy_(bias)


def _entrance(
    model: nn.Module, first: nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[list[tuple[tuple, dict[str, Any]]], list[Tensor], list[Tensor]]:
    """What the first layer is called with, its hidden states apart, and which tokens are real."""
    device = next(model.parameters()).device
    calls, states, masks = [], [], []

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        states.append(args[0] if args else kwargs.pop("hidden_states"))
        calls.append((args[1:], kwargs))
        raise _Reached

    handle = first.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for batch in batches:
            inputs = model_inputs(batch, device)
            with suppress(_Reached):
                model(**inputs)
            masks.append(inputs["attention_mask"].reshape(-1).bool())
    finally:
        handle.remove()
    return calls, states, masks
