"""What enters each linear layer, and how much the loss cares about what leaves it, over real tokens only.

The running sums are float64. The product of each batch is float32, but of inputs shifted by the first batch's mean:
what follows a LayerNorm has a mean far larger than its variance in some features, and the covariance would otherwise
drown in the rounding of E[x] E[x]^T. Layers that read the same tensor (query, key, value) share one entry.

Gradients are label-free: the loss of an example is the cross-entropy against a class drawn from the model's *own*
distribution at a temperature, whose mean outer product is the Fisher information (Martens, JMLR 2020, section 5).
A fine-tuned model is almost certain of most of its training examples, so against their labels nearly all gradients
vanish and a few mistakes decide everything; the temperature gives every example a say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UserError
from .files import atomic_file, parse_json
from .tensor_files import open_tensors

# What can be collected: of inputs; of output gradients; and the row-summed Fisher information of the weights.
NEEDS = ("inputs", "gradients", "fisher")
# Bounds on a token's gradient norm, relative to the batch's mean (LEMS, ICML 2026): no token decides alone, none is lost.
CLIP = (0.1, 10.0)
TEMPERATURE = 2.0
CHECKPOINT_EVERY = 16


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
    E[|g|^2 x x^T] / E|g|^2 (n, n) and ``input_mean`` (n,): the inputs of the tokens that matter, with the clipped norms.
    """

    second_moment: Tensor
    energy: float
    input_second_moment: Tensor
    input_mean: Tensor

    @property
    def relative_second_moment(self) -> Tensor:
        """E[g g^T] over its mean diagonal (the identity if no gradient reaches the layer)."""
        scale = self.second_moment.diagonal().mean()
        return self.second_moment / scale if scale > 0 else torch.eye(
            len(self.second_moment), dtype=self.second_moment.dtype, device=self.second_moment.device)

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
        parts = (self.inputs and self.inputs.mean, self.gradients and self.gradients.input_mean, self.fisher)
        return next((len(part) for part in parts if part is not None), None)

    def to(self, device: torch.device) -> LayerStatistics:
        """The same on another device."""
        def moved(entry: Any) -> Any:
            return entry and replace(entry, **{key: value.to(device) for key, value in vars(entry).items()
                                               if isinstance(value, Tensor)})

        return LayerStatistics(self.name, moved(self.inputs), moved(self.gradients),
                               None if self.fisher is None else self.fisher.to(device))


@dataclass
class Statistics:
    """``inputs`` by name of the first layer that reads a tensor, ``source`` maps every layer to that name; ``gradients``
    and ``fisher`` by layer. ``fingerprint`` names the model and the data that they were collected from."""

    inputs: dict[str, InputStatistics]
    source: dict[str, str]
    fingerprint: str
    gradients: dict[str, GradientStatistics] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, needs: Iterable[str] = ("inputs",)) -> LayerStatistics:
        """What is known of the layer called ``name``.

        Raises:
            UserError: something in ``needs`` was not collected for it.
        """
        layer = LayerStatistics(name, self.inputs.get(self.source.get(name, "")), self.gradients.get(name),
                                self.fisher.get(name))
        for need in needs:
            if getattr(layer, need) is None:
                raise UserError(f"the statistics hold no {need} of {name}; collect them again for this model, selection "
                                "and method")
        return layer

    def energies(self) -> dict[str, float]:
        """By layer, E|g|^2 per output feature: what a unit of squared error at its output costs.

        Raises:
            UserError: gradients were not collected.
        """
        if not self.gradients:
            raise UserError("the statistics hold no gradients; collect them again for this allocation")
        return {name: entry.energy / len(entry.second_moment) for name, entry in self.gradients.items()}

    def check(self, expected: str) -> None:
        """Raise UserError unless these were collected from the model and data whose ``fingerprint`` is ``expected``."""
        if self.fingerprint != expected:
            raise UserError(f"the statistics were collected from another model or other data ({self.fingerprint}, not "
                            f"{expected}); delete the file and collect them again")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for kind, entries in (("inputs", self.inputs), ("gradients", self.gradients)):
            for name, entry in entries.items():
                tensors.update({f"{kind}:{name}:{key}": value for key, value in vars(entry).items()
                                if isinstance(value, Tensor)})
        tensors.update({f"fisher:{name}:": value for name, value in self.fisher.items()})
        about = {"source": self.source, "fingerprint": self.fingerprint,
                 "tokens": {name: entry.tokens for name, entry in self.inputs.items()},
                 "energy": {name: entry.energy for name, entry in self.gradients.items()}}
        _write(path, about, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is absent or is not one of statistics.
        """
        try:
            about, tensors = _read(path)
            groups: dict[tuple[str, str], dict[str, Tensor]] = {}
            for key, value in tensors.items():
                kind, name, part = key.split(":")
                groups.setdefault((kind, name), {})[part] = value
            found = cls({name: InputStatistics(**groups["inputs", name], tokens=tokens)
                         for name, tokens in about["tokens"].items()}, about["source"], about["fingerprint"],
                        {name: GradientStatistics(**groups["gradients", name], energy=energy)
                         for name, energy in about["energy"].items()},
                        {name: parts[""] for (kind, name), parts in groups.items() if kind == "fisher"})
            found._validate()
        except (UserError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a file of statistics ({error}); delete it and collect them again") from error
        return found

    def _validate(self) -> None:
        """Raise ValueError or TypeError for what no collection makes: other shapes and types, values that are no numbers."""
        def check(name: str, matrix: Tensor | None, *vectors: Tensor) -> None:
            width = len(vectors[0]) if vectors and vectors[0].ndim else len(matrix) if matrix is not None and matrix.ndim else 0
            for tensor, shape in (*((vector, (width,)) for vector in vectors),
                                  *([] if matrix is None else [(matrix, (width, width))])):
                if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape or not width:
                    raise ValueError(f"{name} has a {tensor.dtype} tensor of shape {tuple(tensor.shape)}")
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} has values that are not finite numbers")

        for name, entry in self.inputs.items():
            check(name, entry.second_moment, entry.mean, entry.abs_mean)
            if type(entry.tokens) is not int or entry.tokens < 1:
                raise ValueError(f"{name} has {entry.tokens!r} tokens")
        for name, entry in self.gradients.items():
            check(name, entry.second_moment)
            check(name, entry.input_second_moment, entry.input_mean)
            if type(entry.energy) not in (int, float) or not 0 <= entry.energy < float("inf"):
                raise ValueError(f"{name} has the energy {entry.energy!r}")
        for name, value in self.fisher.items():
            check(name, None, value)
        if not isinstance(self.fingerprint, str) or not all(isinstance(value, str) for value in self.source.values()):
            raise ValueError("its fingerprint or its sources are no names")


def _write(path: str | Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"bert_decomp": json.dumps(about), "checksum": _checksum(about, tensors)})


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open_tensors(path) as file:
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    if "bert_decomp" not in metadata:
        raise ValueError("it does not describe itself")
    about = parse_json(metadata["bert_decomp"], f"the description in {path}")
    # Files from before there were checksums have none.
    if metadata.get("checksum", found := _checksum(about, tensors)) != found:
        raise ValueError("its checksum differs: it is damaged")
    return about, tensors


def _checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """Hooks that add up what enters and leaves the chosen layers. ``sums`` is flat, so that it can be saved and resumed."""

    def __init__(self, modules: dict[str, nn.Module], needs: Iterable[str]):
        self.sums: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}
        self.tokens = self.examples = 0
        self._needs = frozenset(needs)
        self._gradients = bool(self._needs & {"gradients", "fisher"})
        self._mask = torch.empty(0)
        # The tensors seen in this pass, kept alive so that equal identity means the same tensor.
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._outputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def add(self, key: str, value: Tensor) -> None:
        """Add ``value`` to the float64 sum called ``key``."""
        if key not in self.sums:
            self.sums[key] = torch.zeros_like(value, dtype=torch.float64)
        self.sums[key] += value

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            x = inputs[0].detach()
            first, _ = self._seen.setdefault(id(inputs[0]), (name, inputs[0]))
            self.source.setdefault(name, first)
            if self.source[name] == name:
                tokens = x.reshape(-1, x.shape[-1])[self._mask].float()
                if f"{name}:shift" not in self.sums:
                    self.sums[f"{name}:shift"] = tokens.mean(0)
                if "inputs" in self._needs:
                    self.add(f"{name}:abs_mean", tokens.abs().sum(0, dtype=torch.float64))
                    tokens = tokens - self.sums[f"{name}:shift"]
                    self.add(f"{name}:second_moment", tokens.T @ tokens)
                    self.add(f"{name}:mean", tokens.sum(0, dtype=torch.float64))
            if self._gradients:
                # The parameters are frozen, so the first layers of the selection are where the graph begins.
                output = output if output.requires_grad else output.requires_grad_()
                self._outputs[name] = (x, output)
                return output
            return None

        return record

    def run(self, model: nn.Module, inputs: dict[str, Tensor], temperature: float, generator: torch.Generator) -> None:
        """One forward (and, for gradients, one backward) pass over a padded batch."""
        mask = inputs["attention_mask"]
        self._mask, self._seen, self._outputs = mask.reshape(-1).bool(), {}, {}
        self.tokens += int(mask.sum())
        self.examples += len(mask)
        with torch.set_grad_enabled(self._gradients):
            output = model(**inputs)
            if self._gradients:
                outputs = [output for _, output in self._outputs.values()]
                loss = _own_loss(output.logits.float(), temperature, generator)
                gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        if self._gradients:
            for (name, (x, output)), gradient in zip(self._outputs.items(), gradients):
                self._add_gradient(name, x, torch.zeros_like(output) if gradient is None else gradient)

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if "fisher" in self._needs:
            # Per example, sum over o of (sum over t of g_to x_tj)^2, as (sum over t, u of (g_t . g_u) x_tj x_uj): the
            # square of tokens instead of the size of the weight. Padding is left out.
            live = self._mask.reshape(*x.shape[:-1], 1)
            g, kept = (gradient * live).float(), x.float()
            self.add(f"{name}:fisher", (torch.bmm(torch.bmm(g, g.transpose(1, 2)), kept) * kept).sum((0, 1)))
        if "gradients" not in self._needs:
            return
        x = x.reshape(-1, x.shape[-1])[self._mask].float() - self.sums[f"{self.source[name]}:shift"]
        g = gradient.reshape(-1, gradient.shape[-1])[self._mask].float()
        norms = g.norm(dim=1)
        mean = norms.mean().clamp_min(1e-30)
        clipped = norms.clamp(CLIP[0] * mean, CLIP[1] * mean)
        g = g * (clipped / norms.clamp_min(1e-30))[:, None]
        weighted = x * clipped[:, None]
        self.add(f"{name}:gradient_second_moment", g.T @ g)
        self.add(f"{name}:energy", norms.double().square().sum())
        self.add(f"{name}:weight", clipped.double().square().sum())
        self.add(f"{name}:input_second_moment", weighted.T @ weighted)
        self.add(f"{name}:input_mean", (weighted * clipped[:, None]).sum(0, dtype=torch.float64))

    def statistics(self, names: Iterable[str], digest: str) -> Statistics:
        """The means, on the CPU."""
        sums = {key: value.double().cpu() for key, value in self.sums.items()}

        def moments(name: str, prefix: str, total: Tensor) -> tuple[Tensor, Tensor]:
            """Undo the shift: E[x x^T] = E[(x-c)(x-c)^T] + c d^T + d c^T + c c^T with d = E[x] - c."""
            shift, difference = sums[f"{self.source[name]}:shift"], sums[f"{name}:{prefix}mean"] / total
            cross = torch.outer(shift, difference)
            return (sums[f"{name}:{prefix}second_moment"] / total + cross + cross.T + torch.outer(shift, shift),
                    shift + difference)

        inputs, gradients, fisher = {}, {}, {}
        for name in names:
            if f"{name}:second_moment" in sums:
                inputs[name] = InputStatistics(*moments(name, "", torch.tensor(self.tokens)),
                                               sums[f"{name}:abs_mean"] / self.tokens, self.tokens)
            if f"{name}:energy" in sums:
                gradients[name] = GradientStatistics(
                    sums[f"{name}:gradient_second_moment"] / self.tokens, float(sums[f"{name}:energy"]) / self.tokens,
                    *moments(name, "input_", sums[f"{name}:weight"].clamp_min(1e-300)))
            if f"{name}:fisher" in sums:
                fisher[name] = sums[f"{name}:fisher"] / self.examples
        return Statistics(inputs, self.source, digest, gradients, fisher)

    def close(self) -> None:
        self._seen, self._outputs = {}, {}
        for handle in self._handles:
            handle.remove()

    def save(self, path: Path, done: int, digest: str) -> None:
        """Write the sums after ``done`` batches."""
        about = {"done": done, "digest": digest, "source": self.source, "tokens": self.tokens, "examples": self.examples}
        _write(path, about, {key: value.cpu() for key, value in self.sums.items()})

    def resume(self, path: Path, digest: str, device: torch.device) -> int:
        """Take up the sums in ``path`` if they are of the same work; how many batches they hold."""
        try:
            about, sums = _read(path)
        except (UserError, OSError, TypeError, KeyError, ValueError):
            return 0
        if about.get("digest") != digest:
            return 0
        self.sums = {key: value.to(device) for key, value in sums.items()}
        self.source, self.tokens, self.examples = about["source"], about["tokens"], about["examples"]
        return about["done"]


def _own_loss(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Summed over examples: cross-entropy against a class drawn from softmax(logits / temperature), whose mean outer
    gradient is the Fisher information at that temperature; for one output, the output times a random sign."""
    if logits.shape[-1] == 1:
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        return (logits * signs.to(logits.device)).sum()
    scaled = logits / temperature
    drawn = torch.multinomial(scaled.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
    return -scaled.log_softmax(-1).gather(-1, drawn).sum()


def collect_statistics(model: nn.Module, batches: list[dict[str, Tensor]], modules: dict[str, nn.Module], *,
                       needs: Iterable[str] = ("inputs",), progress: bool = True, temperature: float = TEMPERATURE,
                       checkpoint: str | Path | None = None) -> Statistics:
    """Run ``model`` over padded ``batches`` and gather the statistics of ``modules``.

    Args:
        batches: dicts with at least ``input_ids`` and ``attention_mask`` (batch, tokens); ``labels`` are ignored.
        modules: linear layers by qualified name, as ``select_linears`` gives them.
        needs: some of ``NEEDS``; nothing else is collected.
        temperature: of the model's own distribution, from which gradients are taken.
        checkpoint: a file to which the sums are written every few batches, and from which a collection of the same
            model, data and needs goes on; removed at the end.

    Raises:
        UserError: an unknown need, or the batches hold no token.
    """
    needs = tuple(sorted(set(needs)))
    if set(needs) - set(NEEDS):
        raise UserError(f"unknown statistics {', '.join(sorted(set(needs) - set(NEEDS)))}; choose from {', '.join(NEEDS)}")
    if not any(int(batch["attention_mask"].sum()) for batch in batches):
        raise UserError("there is no calibration token; give training examples")
    was_training, device = model.training, next(model.parameters()).device
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    digest = fingerprint(model, batches)
    work = hashlib.sha256(repr((digest, needs, temperature, list(modules))).encode()).hexdigest()[:16]
    checkpoint = None if checkpoint is None else Path(checkpoint)
    collector = _Collector(modules, needs)
    try:
        model.eval().requires_grad_(False)
        done = collector.resume(checkpoint, work, device) if checkpoint is not None else 0
        for index in tqdm(range(done, len(batches)), initial=done, total=len(batches), desc="statistics", unit="batch",
                          disable=not progress, leave=False):
            inputs = {name: value.to(device) for name, value in batches[index].items() if name != "labels"}
            # A generator a batch, so that a resumed collection draws what an uninterrupted one would.
            collector.run(model, inputs, temperature, torch.Generator().manual_seed(index))
            if checkpoint is not None and (index + 1) % CHECKPOINT_EVERY == 0:
                collector.save(checkpoint, index + 1, work)
    finally:
        collector.close()
        model.train(was_training)
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return collector.statistics(modules, digest)
