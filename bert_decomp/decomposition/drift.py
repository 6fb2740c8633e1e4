"""The drift refit: a layer's two output matrices again, on what the compressed network feeds them.

Layer by layer, with z' what enters an output matrix in the compressed network, x' the residual that its result is added
to, and y + x the sum that the dense network had for the same token, W and b are refitted by ridge regression towards

    W z' + b  ~  y + (x - x')

so that the sum, not the result alone, is the dense one: what earlier layers lost is made up for. The ridge pulls
towards the weight that was there, by ``RIDGE`` times the mean variance of z'. Tokens count as in the statistics, by
|dLoss/dy|^2. Of two factors only ``up`` is refitted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from ..kinds import model_inputs
from ..models.architectures import FAMILIES, Family, encoder_layers, submodule
from ..models.resized import Constant
from ..statistics import token_weights

RIDGE = 0.05
# Each output matrix with the module that normalises its sum.
OUTPUTS = (("attention_output", "attention_norm"), ("ffn_output", "ffn_norm"))


class _Moments:
    """Weighted sums over tokens of inputs z and targets y, both shifted by the first batch's mean; float64."""

    def __init__(self) -> None:
        self._total = 0.0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add tokens: (tokens, n), (tokens, m), (tokens,)."""
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

    def refit(self, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weight (m, n) and the bias (m,) that answer best, pulled towards ``weight``.

        Raises:
            ValueError: nothing was added.
        """
        if self._shifts is None:
            raise ValueError("there are no tokens to refit to")
        second, cross, mean, target = (value / max(self._total, 1e-300) for value in self._sums)
        covariance = second - torch.outer(mean, mean)
        pull = ridge * covariance.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(mean), dtype=covariance.dtype, device=covariance.device)
        result = torch.linalg.solve(
            covariance + pull * eye,
            cross - torch.outer(mean, target) + pull * weight.double().T,
        ).T
        shift_in, shift_out = (shift.double() for shift in self._shifts)
        return result, shift_out + target - result @ (shift_in + mean)


class _Recorder:
    """Runs one layer on one batch and keeps what enters and leaves an output matrix, and the sum that is normalised."""

    def __init__(self, family: Family):
        self._family = family

    def run(
        self, layer: nn.Module, states: Tensor, call: tuple[tuple, dict[str, Any]]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """The layer's result, and by output matrix what entered it, what left it, and the sum."""
        seen: dict[str, Tensor] = {}
        handles = []
        for output, norm in OUTPUTS:
            handles.append(
                layer.get_submodule(getattr(self._family, output)).register_forward_hook(
                    lambda _module, args, result, part=output: seen.update(
                        {f"{part} in": args[0], f"{part} out": result}
                    )
                )
            )
            handles.append(
                layer.get_submodule(getattr(self._family, norm)).register_forward_pre_hook(
                    lambda _module, args, part=output: seen.update({f"{part} sum": args[0]})
                )
            )
        try:
            result = layer(states, *call[0], **call[1])
        finally:
            for handle in handles:
                handle.remove()
        result = result[0] if isinstance(result, tuple) else result
        return result, {
            part: (seen[f"{part} in"], seen[f"{part} out"], seen[f"{part} sum"])
            for part, _ in OUTPUTS
        }


@torch.no_grad()
def refit_(
    model: nn.Module,
    teacher: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    *,
    ridge: float = RIDGE,
    progress: bool = True,
) -> None:
    """Refit the output matrices of ``model``, in place.

    Args:
        model: decomposed from ``teacher``.
        teacher: the dense model.
        batches: padded inputs; those of the statistics will do.

    Raises:
        UserError: the layers of this architecture do not normalise after each half.
    """
    family = FAMILIES.get(teacher.config.model_type)
    if family is None or family.attention_norm is None:
        raise UserError(
            f"the drift refit needs layers that normalise after each half; {teacher.config.model_type} is "
            "without: leave the refit out"
        )
    recorder, was_training = _Recorder(family), (model.training, teacher.training)
    model.eval(), teacher.eval()
    dense, low = encoder_layers(teacher), encoder_layers(model)
    outputs = {
        f"{name}.{getattr(family, part)}": dense[name].get_submodule(getattr(family, part))
        for name in dense
        for part, _ in OUTPUTS
    }
    with torch.enable_grad():
        weights = token_weights(teacher, batches, outputs, progress=progress)
    calls, states, masks = _entrance(teacher, next(iter(dense.values())), batches)
    low_states = list(states)
    for name in tqdm(dense, desc="refit", unit="layer", disable=not progress, leave=False):
        targets = []
        for index, state in enumerate(states):
            states[index], seen = recorder.run(dense[name], state, calls[index])
            targets.append(
                {part: total.flatten(0, -2)[masks[index]] for part, (_, _, total) in seen.items()}
            )
        for part, _ in OUTPUTS:
            module, moments = _output(low[name], getattr(family, part)), _Moments()
            for index, state in enumerate(low_states):
                _, seen = recorder.run(low[name], state, calls[index])
                entering, leaving, total = (x.flatten(0, -2)[masks[index]] for x in seen[part])
                if isinstance(module, LowRankLinear):
                    entering = entering @ module.down.T
                elif isinstance(module, Constant):
                    entering = entering[:, :0]
                moments.add(
                    entering.float(),
                    (targets[index][part] - (total - leaving)).float(),
                    weights[f"{name}.{getattr(family, part)}"][index],
                )
            _put(module, moments, ridge)
        for index, state in enumerate(low_states):
            low_states[index], _ = recorder.run(low[name], state, calls[index])
    model.train(was_training[0]), teacher.train(was_training[1])


def _output(layer: nn.Module, name: str) -> LowRankLinear | Constant | nn.Linear:
    module = layer.get_submodule(name)
    if not isinstance(module, (LowRankLinear, Constant)):
        return submodule(layer, name, nn.Linear)
    return module


def _put(module: LowRankLinear | Constant | nn.Linear, moments: _Moments, ridge: float) -> None:
    if isinstance(module, Constant):
        weight = module.bias.new_zeros(len(module.bias), 0)
    else:
        weight = module.up if isinstance(module, LowRankLinear) else module.weight
    refitted, bias = moments.refit(weight, ridge)
    weight.copy_(refitted)
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

    handle = first.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for batch in batches:
            inputs = model_inputs(batch, device)
            model(**inputs)
            masks.append(inputs["attention_mask"].reshape(-1).bool())
    finally:
        handle.remove()
    return calls, states, masks
