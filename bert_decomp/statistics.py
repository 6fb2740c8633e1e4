"""Second moments and means of what enters each linear layer, over real tokens only.

The running sums are float64. The product of each batch is float32, but of inputs shifted by the first batch's mean:
what follows a LayerNorm has a mean far larger than its variance in some features, and the covariance would otherwise
drown in the rounding of E[x] E[x]^T. Layers that read the same tensor (query, key, value) share one entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UserError
from .files import atomic_file


@dataclass
class InputStatistics:
    """Of one tensor x that enters linear layers: ``second_moment`` E[x x^T] (n, n), ``mean`` E[x] (n,), float64, and
    the number of ``tokens`` they are taken over."""

    second_moment: Tensor
    mean: Tensor
    tokens: int

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T."""
        return self.second_moment - torch.outer(self.mean, self.mean)


@dataclass
class Statistics:
    """``inputs`` by name of the first layer that reads a tensor; ``source`` maps every layer to that name.

    ``fingerprint`` names the model and the data that they were collected from.
    """

    inputs: dict[str, InputStatistics]
    source: dict[str, str]
    fingerprint: str

    def of(self, name: str) -> InputStatistics:
        """What enters the layer called ``name``.

        Raises:
            UserError: nothing was collected for it.
        """
        if name not in self.source:
            raise UserError(f"the statistics hold nothing for {name}; collect them again for this model and selection")
        return self.inputs[self.source[name]]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {}
        for name, entry in self.inputs.items():
            tensors[f"{name}.second_moment"], tensors[f"{name}.mean"] = entry.second_moment, entry.mean
        about = {"source": self.source, "fingerprint": self.fingerprint,
                 "tokens": {name: entry.tokens for name, entry in self.inputs.items()}}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"bert_decomp": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is absent or is not one of statistics.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["bert_decomp"])
                inputs = {name: InputStatistics(file.get_tensor(f"{name}.second_moment"),
                                                file.get_tensor(f"{name}.mean"), tokens)
                          for name, tokens in about["tokens"].items()}
            return cls(inputs, about["source"], about["fingerprint"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not a file of statistics ({error}); delete it and collect them again") from error


def fingerprint(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> str:
    """A digest of a model's weights and of the token ids of its calibration batches."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for batch in batches:
        digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Collector:
    """Hooks that add up what enters the chosen layers during forward passes."""

    def __init__(self, modules: dict[str, nn.Module]):
        # By name: the shift c (n,), sum of (x - c)(x - c)^T (n, n), sum of x - c (n,).
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.source: dict[str, str] = {}
        self.mask: Tensor | None = None
        # The tensors seen in this pass, kept alive so that equal identity means the same tensor.
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first, _ = self._seen.setdefault(id(x), (name, x))
            self.source.setdefault(name, first)
            if self.source[name] != name:
                return
            tokens = x.reshape(-1, x.shape[-1])[self.mask].float()
            if name not in self.sums:
                size = tokens.shape[-1]
                self.sums[name] = (tokens.mean(0), torch.zeros(size, size, dtype=torch.float64, device=x.device),
                                   torch.zeros(size, dtype=torch.float64, device=x.device))
            shift, second, first_moment = self.sums[name]
            tokens = tokens - shift
            second += tokens.T @ tokens
            first_moment += tokens.sum(0, dtype=torch.float64)

        return record

    def start(self, mask: Tensor) -> None:
        self.mask, self._seen = mask.reshape(-1).bool(), {}

    def close(self) -> None:
        self._seen = {}
        for handle in self._handles:
            handle.remove()

    def result(self, name: str, tokens: int) -> InputStatistics:
        """Undo the shift: E[x x^T] = E[(x-c)(x-c)^T] + c d^T + d c^T + c c^T with d = E[x] - c."""
        shift, second, first_moment = (tensor.double().cpu() for tensor in self.sums[name])
        difference = first_moment / tokens
        cross = torch.outer(shift, difference)
        return InputStatistics(second / tokens + cross + cross.T + torch.outer(shift, shift), shift + difference, tokens)


@torch.inference_mode()
def collect_statistics(model: nn.Module, batches: list[dict[str, Tensor]], modules: dict[str, nn.Module], *,
                       progress: bool = True) -> Statistics:
    """Run ``model`` over padded ``batches`` and gather the statistics of what enters ``modules``.

    Args:
        batches: dicts with at least ``input_ids`` and ``attention_mask`` (batch, tokens); ``labels`` are ignored.
        modules: linear layers by qualified name, as ``select_linears`` gives them.

    Raises:
        UserError: the batches hold no token.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    collector, tokens = _Collector(modules), 0
    try:
        for batch in tqdm(batches, desc="statistics", unit="batch", disable=not progress, leave=False):
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            collector.start(inputs["attention_mask"])
            tokens += int(inputs["attention_mask"].sum())
            model(**inputs)
    finally:
        collector.close()
        model.train(was_training)
    if tokens == 0:
        raise UserError("there is no calibration token; give training examples")
    inputs = {name: collector.result(name, tokens) for name in collector.sums}
    return Statistics(inputs, collector.source, fingerprint(model, batches))
