"""``anchored``: layers are factored in the order of their work, each on what the network compressed so far feeds it.

With x what enters a matrix in the dense model and x' what enters it, for the same token, where all before it is
factored already, the matrix is made to answer x' as the dense one answers x:

    argmin E (g^T (W x - W_hat x'))^2,    S' = Cov(x') = L' L'^T:    [G^(1/2) W Cov(x, x') L'^-T]_r L'^-1

so that it takes back what earlier layers lost. Matrices that read one tensor (query, key, value) are one group,
factored together. Of the calibration set only the hidden states before the current layer are kept, so each group costs
that one layer, dense and compressed, and nothing runs twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..kinds import model_inputs
from ..methods import Drift, Method
from ..models.architectures import encoder_layers
from ..statistics import LayerStatistics, Statistics, token_weights

# From the name of a matrix, its statistics in the compressed network, and how far that drifted, the layer to put there.
Factor = Callable[[str, LayerStatistics, Drift], nn.Module]


class _Stop(Exception):
    """The tensor that was waited for has been seen."""


class _Moments:
    """Sums over tokens of x (dense) and x' (compressed), weighted or not, shifted by the first batch's mean as those of
    ``statistics`` are: products of a batch in the inputs' type, sums in float64."""

    def __init__(self) -> None:
        self._total = 0.0
        self._sums: list[Tensor] = []
        self._shift = torch.empty(0)

    def add(self, dense: Tensor, low: Tensor, weights: Tensor | None) -> None:
        """Add tokens (tokens, n) of both networks; ``weights`` (tokens,)."""
        if not self._total:
            self._shift = dense.mean(0)
        dense, low = dense - self._shift, low - self._shift
        weighted = low if weights is None else low * weights[:, None]
        of_dense = dense if weights is None else dense * weights[:, None]
        sums = [
            low.T @ weighted,
            dense.T @ weighted,
            of_dense.sum(0, dtype=torch.float64),
            weighted.sum(0, dtype=torch.float64),
        ]
        if self._sums:
            self._sums = [old + new.double() for old, new in zip(self._sums, sums, strict=True)]
        else:
            self._sums = [new.double() for new in sums]
        self._total += len(low) if weights is None else float(weights.sum(dtype=torch.float64))

    def finish(self) -> tuple[Tensor, Tensor, Drift]:
        """E[x' x'^T] (n, n), E[x'] (n,) and the drift, float64, on the CPU."""
        second, cross, of_dense, of_low = (
            value.cpu() / max(self._total, 1e-300) for value in self._sums
        )
        shift, covariance = self._shift.double().cpu(), second - torch.outer(of_low, of_low)
        mean = shift + of_low
        return (
            covariance + torch.outer(mean, mean),
            mean,
            Drift(cross - torch.outer(of_dense, of_low) - covariance, shift + of_dense),
        )


class _Replay:
    """The calibration set at the entrance of one encoder layer after another, in the dense and the compressed
    network."""

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], chosen: list[str]):
        self.layers, self._device = encoder_layers(model), next(model.parameters()).device
        self.groups: dict[str, list[list[str]]] = {name: [] for name in self.layers}
        self.masks: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        self._dense: list[Tensor] = []
        outside = [
            name
            for name in chosen
            if not name.startswith(tuple(f"{layer}." for layer in self.layers))
        ]
        if outside:
            raise UserError(
                f"anchored goes from one encoder layer to the next, and {outside[0]} is in none; exclude it"
            )
        for batch in batches:
            self._capture(
                model,
                model_inputs(batch, self._device),
                chosen,
            )
        self._low = list(self._dense)

    def _capture(self, model: nn.Module, inputs: dict[str, Tensor], chosen: list[str]) -> None:
        """One pass: what each layer is called with, and at the first batch which matrices read the same tensor."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        states: list[Tensor] = []
        readers: dict[int, tuple[Tensor, list[str]]] = {}

        def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            states.append(args[0] if args else kwargs.pop("hidden_states"))
            calls.append((args[1:], kwargs))

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            states.append(_first(output))

        def read(name: str) -> Callable[[nn.Module, tuple], None]:
            return lambda _module, args: readers.setdefault(id(args[0]), (args[0], []))[1].append(
                name
            )

        handles = [
            layer.register_forward_pre_hook(enter, with_kwargs=True)
            for layer in self.layers.values()
        ]
        handles += [layer.register_forward_hook(leave) for layer in self.layers.values()]
        if not self.masks:
            handles += [
                model.get_submodule(name).register_forward_pre_hook(read(name)) for name in chosen
            ]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.layers) or any(
            left is not entered for left, entered in zip(states[1::2], states[2::2], strict=False)
        ):
            raise UserError(
                "anchored needs an encoder in which each layer reads what the one before it gave; leave it out"
            )
        for _, names in readers.values():
            layer = next(layer for layer in self.layers if names[0].startswith(f"{layer}."))
            self.groups[layer].append([name.removeprefix(f"{layer}.") for name in names])
        self._calls.append(calls)
        self._dense.append(states[0])
        self.masks.append(inputs["attention_mask"].reshape(-1).bool())

    def inputs(
        self, index: int, part: str, dense: nn.Module, low: nn.Module
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """By batch, what enters the module ``part`` of layer ``index`` in both networks: real tokens (tokens, n)."""
        for batch, mask in enumerate(self.masks):
            call = self._call(index, batch)
            of_dense = self._entering(call, dense, part, self._dense[batch])
            of_low = self._entering(call, low, part, self._low[batch])
            yield of_dense.flatten(0, -2)[mask].float(), of_low.flatten(0, -2)[mask].float()

    def _call(self, index: int, batch: int) -> tuple[tuple, dict[str, Any]]:
        return self._calls[batch][index]

    @staticmethod
    def _entering(
        call: tuple[tuple, dict[str, Any]], layer: nn.Module, part: str, state: Tensor
    ) -> Tensor:
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise _Stop

        handle = layer.get_submodule(part).register_forward_pre_hook(stop)
        try:
            layer(state, *call[0], **call[1])
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0]

    def advance(self, index: int, dense: nn.Module, low: nn.Module) -> None:
        """Go on to the entrance of the layer after ``index``."""
        for batch in range(len(self.masks)):
            args, kwargs = self._call(index, batch)
            self._dense[batch] = _first(dense(self._dense[batch], *args, **kwargs))
            self._low[batch] = _first(low(self._low[batch], *args, **kwargs))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def anchored_layers(
    model: nn.Module,
    chosen: list[str],
    method: Method,
    statistics: Statistics,
    batches: list[dict[str, Tensor]],
    factor: Factor,
    *,
    progress: bool = True,
) -> dict[str, nn.Module]:
    """The layer that takes the place of each of ``chosen``, found one group after another; ``model`` stays as it is.

    Args:
        chosen: qualified names of linear layers.
        method: one that has an anchor.
        statistics: of the dense model on the same ``batches``, from which everything but the inputs' moments is taken.
        batches: the calibration set, padded.
        factor: makes a layer for the network compressed so far.

    Raises:
        UserError: a matrix is outside the encoder's layers, or these do not follow each other.
    """
    was_training = model.training
    layers: dict[str, nn.Module] = {}
    model.eval()
    try:
        replay = _Replay(model, batches, chosen)
        weights = {}
        if method.anchor == "gradients":
            with torch.enable_grad():
                weights = token_weights(
                    model,
                    batches,
                    {name: model.get_submodule(name) for name in chosen},
                    statistics,
                    progress=progress,
                )
        with tqdm(
            total=len(chosen), desc="anchored", unit="matrix", disable=not progress, leave=False
        ) as bar:
            for index, (prefix, dense) in enumerate(replay.layers.items()):
                low = copy.deepcopy(dense)
                for group in replay.groups[prefix]:
                    names = [f"{prefix}.{part}" for part in group]
                    # Without weights of tokens one set of moments serves the whole group.
                    sums = [_Moments() for _ in (names if weights else names[:1])]
                    for batch, (x, moved) in enumerate(replay.inputs(index, group[0], dense, low)):
                        for name, moments in zip(names, sums, strict=False):
                            moments.add(x, moved, weights[name][batch] if weights else None)
                    found = [moments.finish() for moments in sums] * (1 if weights else len(names))
                    for part, name, (second_moment, mean, drift) in zip(
                        group, names, found, strict=True
                    ):
                        layer = method.with_input_moments(
                            statistics.of(name, method.needs), second_moment, mean
                        )
                        layers[name] = factor(name, layer, drift)
                        low.set_submodule(part, layers[name])
                        bar.update()
                replay.advance(index, dense, low.eval())
    finally:
        model.train(was_training)
    return {name: layer.train(model.get_submodule(name).training) for name, layer in layers.items()}
