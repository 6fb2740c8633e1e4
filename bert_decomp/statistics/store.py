"""Collected statistics as plain data, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..io.atomic import atomic_file
from ..io.safetensors import open_tensors
from .files import read_tensors, write_tensors
from .moments import GradientStatistics, InputStatistics, LayerStatistics


@dataclass
class EmbeddingStatistics:
    """``counts`` (tokens,) how often each token stands in the calibration text, ``gradients`` E[g g^T] (width, width)
    over its tokens with clipped norms, scaled to the trace E|g|^2 without clipping; both float64."""

    counts: Tensor
    gradients: Tensor

    def save(self, path: str | Path, digest: str) -> None:
        """Write one safetensors file that names the model and data it is of."""
        with atomic_file(path) as temporary:
            save_file(vars(self), temporary, metadata={"fingerprint": digest})

    @classmethod
    def load(cls, path: str | Path, digest: str) -> EmbeddingStatistics:
        """Read what ``save`` wrote.

        Raises:
            UserError: it is damaged, or of another model or data.
        """
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        if (
            metadata.get("fingerprint") != digest
            or set(tensors) != {"counts", "gradients"}
            or not all(
                tensor.dtype == torch.float64 and bool(tensor.isfinite().all())
                for tensor in tensors.values()
            )
        ):
            raise UserError(
                f"{path} holds embedding statistics of another model or other data, or is damaged; delete it"
            )
        return cls(**tensors)


@dataclass
class Statistics:
    """``inputs`` by name of the first layer that reads a tensor, ``source`` maps every layer to that name;
    ``gradients`` and ``fisher`` by layer. ``fingerprint`` names the model and the data that they were collected from;
    ``embedding`` is of the word embedding and kept in a file of its own.

    >>> x = torch.randn(100, 3, dtype=torch.float64)
    >>> inputs = InputStatistics(x.T @ x / 100, x.mean(0), x.abs().mean(0), tokens=100)
    >>> statistics = Statistics({"query": inputs}, {"query": "query", "key": "query"}, "a digest")
    >>> statistics.of("key").inputs.covariance.shape
    torch.Size([3, 3])
    """

    inputs: dict[str, InputStatistics]
    source: dict[str, str]
    fingerprint: str
    gradients: dict[str, GradientStatistics] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    embedding: EmbeddingStatistics | None = None

    def of(self, name: str, needs: Iterable[str] = ("inputs",)) -> LayerStatistics:
        """What is known of the layer called ``name``.

        Raises:
            UserError: something in ``needs`` was not collected for it.
        """
        layer = LayerStatistics(
            name,
            self.inputs.get(self.source.get(name, "")),
            self.gradients.get(name),
            self.fisher.get(name),
        )
        for need in needs:
            if getattr(layer, need) is None:
                raise UserError(
                    f"the statistics hold no {need} of {name}; collect them again for this model, selection "
                    "and method"
                )
        return layer

    def energies(self) -> dict[str, float]:
        """By layer, E|g|^2 per output feature: what a unit of squared error at its output costs.

        Raises:
            UserError: gradients were not collected.
        """
        if not self.gradients:
            raise UserError(
                "the statistics hold no gradients; collect them again for this allocation"
            )
        return {
            name: entry.energy / len(entry.second_moment) for name, entry in self.gradients.items()
        }

    def check(self, expected: str) -> None:
        """Raise UserError unless these were collected from the model and data whose ``fingerprint`` is ``expected``."""
        if self.fingerprint != expected:
            raise UserError(
                f"the statistics were collected from another model or other data ({self.fingerprint}, not "
                f"{expected}); delete the file and collect them again"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for kind, entries in (("inputs", self.inputs), ("gradients", self.gradients)):
            for name, entry in entries.items():
                tensors.update(
                    {
                        f"{kind}:{name}:{key}": value
                        for key, value in vars(entry).items()
                        if isinstance(value, Tensor)
                    }
                )
        tensors.update({f"fisher:{name}:": value for name, value in self.fisher.items()})
        about = {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "tokens": {name: entry.tokens for name, entry in self.inputs.items()},
            "energy": {name: entry.energy for name, entry in self.gradients.items()},
            "gradient_tokens": {name: entry.tokens for name, entry in self.gradients.items()},
        }
        write_tensors(path, about, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is absent or is not one of statistics.
        """
        try:
            about, tensors = read_tensors(path)
            groups: dict[tuple[str, str], dict[str, Tensor]] = {}
            for key, value in tensors.items():
                kind, name, part = key.split(":")
                groups.setdefault((kind, name), {})[part] = value
            found = cls(
                {
                    name: InputStatistics(**groups["inputs", name], tokens=tokens)
                    for name, tokens in about["tokens"].items()
                },
                about["source"],
                about["fingerprint"],
                {
                    name: GradientStatistics(
                        **groups["gradients", name],
                        energy=energy,
                        # Files from before it was kept do not have it.
                        tokens=about.get("gradient_tokens", {}).get(name),
                    )
                    for name, energy in about["energy"].items()
                },
                {name: parts[""] for (kind, name), parts in groups.items() if kind == "fisher"},
            )
            found._validate()
        except (UserError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not a file of statistics ({error}); delete it and collect them again"
            ) from error
        return found

    def _validate(self) -> None:
        """Raise ValueError or TypeError for what no collection makes: other shapes and types, values that are no
        numbers."""

        def check(name: str, matrix: Tensor | None, *vectors: Tensor) -> None:
            first = vectors[0] if vectors else matrix
            width = len(first) if first is not None and first.ndim else 0
            for tensor, shape in (
                *((vector, (width,)) for vector in vectors),
                *([] if matrix is None else [(matrix, (width, width))]),
            ):
                if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape or not width:
                    raise ValueError(
                        f"{name} has a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
                    )
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} has values that are not finite numbers")

        for name, entry in self.inputs.items():
            check(name, entry.second_moment, entry.mean, entry.abs_mean)
            if type(entry.tokens) is not int or entry.tokens < 1:
                raise ValueError(f"{name} has {entry.tokens!r} tokens")
        for name, part in self.gradients.items():
            check(name, part.second_moment)
            check(name, part.input_second_moment, part.input_mean)
            if type(part.energy) not in (int, float) or not 0 <= part.energy < float("inf"):
                raise ValueError(f"{name} has the energy {part.energy!r}")
            if part.tokens is not None and (type(part.tokens) is not int or part.tokens < 1):
                raise ValueError(f"{name} has gradients of {part.tokens!r} tokens")
            if part.token_weights is not None:
                check(name, None, part.token_weights)
                if part.tokens not in (None, len(part.token_weights)):
                    raise ValueError(f"{name} has weights of other tokens than its {part.tokens}")
        for name, fisher in self.fisher.items():
            check(name, None, fisher)
        if not isinstance(self.fingerprint, str) or not all(
            isinstance(value, str) for value in self.source.values()
        ):
            raise ValueError("its fingerprint or its sources are no names")
