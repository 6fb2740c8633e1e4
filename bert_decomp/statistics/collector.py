"""The sums of a collection: hooks that add up what enters and leaves layers, and the file to resume them from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kinds import kind_of
from .files import read_tensors, write_tensors
from .gradients import clipped_norms
from .moments import GradientStatistics, InputStatistics
from .store import Statistics

# What the tokens' weights are called among the sums in a file.
WEIGHTS = "token_weights"


class Collector:
    """Hooks that add up what enters and leaves the chosen layers. ``sums`` is flat, so that it can be saved and
    resumed."""

    def __init__(self, modules: Mapping[str, nn.Module], needs: Iterable[str]):
        self.sums: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}
        # By layer, the clipped |g|^2 of the tokens of each batch.
        self.token_weights: dict[str, list[Tensor]] = {}
        self.tokens = self.examples = 0
        self._needs = frozenset(needs)
        self._gradients = bool(self._needs & {"gradients", "fisher"})
        self._mask = torch.empty(0)
        # The tensors seen in this pass, kept alive so that equal identity means the same tensor.
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._outputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in modules.items()
        ]

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

    def run(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        """One forward (and, for gradients, one backward) pass over a padded batch."""
        mask = inputs["attention_mask"]
        self._mask, self._seen, self._outputs = mask.reshape(-1).bool(), {}, {}
        self.tokens += int(mask.sum())
        self.examples += len(mask)
        with torch.set_grad_enabled(self._gradients):
            output = model(**inputs)
            if self._gradients:
                outputs = [output for _, output in self._outputs.values()]
                kind = kind_of(model)
                answers = kind.answers(output, inputs).float()
                loss = kind.sampled_loss(answers, temperature, generator)
                gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        if self._gradients:
            for (name, (x, output)), gradient in zip(self._outputs.items(), gradients, strict=True):
                self._add_gradient(
                    name, x, torch.zeros_like(output) if gradient is None else gradient
                )

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if "fisher" in self._needs:
            # Per example, sum over o of (sum over t of g_to x_tj)^2, as (sum over t, u of (g_t . g_u) x_tj x_uj): the
            # square of tokens instead of the size of the weight. Padding is left out.
            live = self._mask.reshape(*x.shape[:-1], 1)
            g, kept = (gradient * live).float(), x.float()
            self.add(
                f"{name}:fisher",
                (torch.bmm(torch.bmm(g, g.transpose(1, 2)), kept) * kept).sum((0, 1)),
            )
        if "gradients" not in self._needs:
            return
        x = x.reshape(-1, x.shape[-1])[self._mask].float() - self.sums[f"{self.source[name]}:shift"]
        g, norms, clipped = self._note_weights(name, gradient)
        g = g * (clipped / norms.clamp_min(1e-30))[:, None]
        weighted = x * clipped[:, None]
        self.add(f"{name}:gradient_second_moment", g.T @ g)
        self.add(f"{name}:energy", norms.double().square().sum())
        self.add(f"{name}:weight", clipped.double().square().sum())
        self.add(f"{name}:input_second_moment", weighted.T @ weighted)
        self.add(f"{name}:input_mean", (weighted * clipped[:, None]).sum(0, dtype=torch.float64))

    def _note_weights(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep how much the tokens count; the real ones' gradients (tokens, m), their norms and clipped norms
        (tokens,)."""
        g = gradient.reshape(-1, gradient.shape[-1])[self._mask].float()
        norms, clipped = clipped_norms(g)
        self.token_weights.setdefault(name, []).append(clipped.square())
        return g, norms, clipped

    def statistics(self, names: Iterable[str], digest: str) -> Statistics:
        """The means, on the CPU. The sums become them in place: a second copy would be as large as all that was
        collected."""
        sums, self.sums = {key: value.double().cpu() for key, value in self.sums.items()}, {}

        def moments(name: str, prefix: str, total: Tensor) -> tuple[Tensor, Tensor]:
            """Undo the shift: E[x x^T] = E[(x-c)(x-c)^T] + c d^T + d c^T + c c^T with d = E[x] - c."""
            shift, difference = (
                sums[f"{self.source[name]}:shift"],
                sums[f"{name}:{prefix}mean"] / total,
            )
            cross = torch.outer(shift, difference)
            second_moment = sums[f"{name}:{prefix}second_moment"].div_(total)
            return second_moment.add_(cross).add_(cross.T).add_(
                torch.outer(shift, shift)
            ), shift + difference

        inputs, gradients, fisher = {}, {}, {}
        for name in names:
            if f"{name}:second_moment" in sums:
                inputs[name] = InputStatistics(
                    *moments(name, "", torch.tensor(self.tokens)),
                    sums[f"{name}:abs_mean"] / self.tokens,
                    self.tokens,
                )
            if f"{name}:energy" in sums:
                gradients[name] = GradientStatistics(
                    sums[f"{name}:gradient_second_moment"].div_(self.tokens),
                    float(sums[f"{name}:energy"]) / self.tokens,
                    *moments(name, "input_", sums[f"{name}:weight"].clamp_min(1e-300)),
                    self.tokens,
                    torch.cat(self.token_weights[name]).double().cpu(),
                )
            if f"{name}:fisher" in sums:
                fisher[name] = sums[f"{name}:fisher"] / self.examples
        return Statistics(inputs, self.source, digest, gradients, fisher)

    def close(self) -> None:
        self._seen, self._outputs = {}, {}
        for handle in self._handles:
            handle.remove()

    def save(self, path: Path, done: int, digest: str) -> None:
        """Write the sums after ``done`` batches."""
        about = {
            "done": done,
            "digest": digest,
            "source": self.source,
            "tokens": self.tokens,
            "examples": self.examples,
        }
        weights = {
            f"{name}:{WEIGHTS}": torch.cat(parts) for name, parts in self.token_weights.items()
        }
        write_tensors(
            path, about, {key: value.cpu() for key, value in {**self.sums, **weights}.items()}
        )

    def resume(self, path: Path, digest: str, device: torch.device) -> int:
        """Take up the sums in ``path`` if they are of the same work; how many batches they hold."""
        try:
            about, sums = read_tensors(path)
        except (UserError, OSError, TypeError, KeyError, ValueError):
            return 0
        if about.get("digest") != digest:
            return 0
        self.sums, self.token_weights = {}, {}
        for key, value in sums.items():
            name, _, kind = key.rpartition(":")
            if kind == WEIGHTS:
                self.token_weights[name] = [value.to(device)]
            else:
                self.sums[key] = value.to(device)
        self.source, self.tokens, self.examples = (
            about["source"],
            about["tokens"],
            about["examples"],
        )
        return about["done"]
