"""Hooks that gather statistics while a model runs over calibration batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..kinds import kind_of, model_inputs
from .files import read_tensors, write_tensors
from .gradients import TEMPERATURE, clipped_norms, frozen
from .moments import GradientStatistics, InputStatistics
from .store import Statistics

# What can be collected: of inputs; of output gradients; and the row-summed Fisher information of the weights.
NEEDS = ("inputs", "gradients", "fisher")
CHECKPOINT_EVERY = 16


def fingerprint(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> str:
    """A digest of a model's weights and of the token ids of its calibration batches."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    for batch in batches:
        digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Collector:
    """Hooks that add up what enters and leaves the chosen layers. ``sums`` is flat, so that it can be saved and
    resumed."""

    def __init__(self, modules: Mapping[str, nn.Module], needs: Iterable[str]):
        self.sums: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}
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
        g = gradient.reshape(-1, gradient.shape[-1])[self._mask].float()
        norms, clipped = clipped_norms(g)
        g = g * (clipped / norms.clamp_min(1e-30))[:, None]
        weighted = x * clipped[:, None]
        self.add(f"{name}:gradient_second_moment", g.T @ g)
        self.add(f"{name}:energy", norms.double().square().sum())
        self.add(f"{name}:weight", clipped.double().square().sum())
        self.add(f"{name}:input_second_moment", weighted.T @ weighted)
        self.add(f"{name}:input_mean", (weighted * clipped[:, None]).sum(0, dtype=torch.float64))

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
        write_tensors(path, about, {key: value.cpu() for key, value in self.sums.items()})

    def resume(self, path: Path, digest: str, device: torch.device) -> int:
        """Take up the sums in ``path`` if they are of the same work; how many batches they hold."""
        try:
            about, sums = read_tensors(path)
        except (UserError, OSError, TypeError, KeyError, ValueError):
            return 0
        if about.get("digest") != digest:
            return 0
        self.sums = {key: value.to(device) for key, value in sums.items()}
        self.source, self.tokens, self.examples = (
            about["source"],
            about["tokens"],
            about["examples"],
        )
        return about["done"]


class _Weights(_Collector):
    """Of all that can be collected, only how much each token counts."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__(modules, ("gradients",))
        self.weights: dict[str, list[Tensor]] = {name: [] for name in modules}

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1])[self._mask].float()
        self.weights[name].append(clipped_norms(g)[1].square())


def token_weights(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    *,
    temperature: float = TEMPERATURE,
    progress: bool = True,
) -> dict[str, list[Tensor]]:
    """By layer and batch, the clipped |g|^2 of every real token (tokens,), with the classes that ``collect_statistics``
    draws for the same batches."""
    device, collector = next(model.parameters()).device, _Weights(modules)
    try:
        with frozen(model):
            for index, batch in enumerate(
                tqdm(batches, desc="token weights", disable=not progress, leave=False)
            ):
                inputs = model_inputs(batch, device)
                collector.run(model, inputs, temperature, torch.Generator().manual_seed(index))
    finally:
        collector.close()
    return collector.weights


def collect_statistics(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    *,
    needs: Iterable[str] = ("inputs",),
    progress: bool = True,
    temperature: float = TEMPERATURE,
    checkpoint: str | Path | None = None,
) -> Statistics:
    """Run ``model`` over padded ``batches`` and gather the statistics of ``modules``.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> ids = torch.arange(1, 97).reshape(6, 16)
    >>> batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    >>> modules = {"query": model.bert.encoder.layer[0].attention.self.query}
    >>> statistics = collect_statistics(model, batches, modules, needs=("inputs", "gradients"), progress=False)
    >>> statistics.of("query").inputs.covariance.shape, statistics.of("query").tokens
    (torch.Size([24, 24]), 96)

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
        raise UserError(
            f"unknown statistics {', '.join(sorted(set(needs) - set(NEEDS)))}; choose from {', '.join(NEEDS)}"
        )
    if not any(int(batch["attention_mask"].sum()) for batch in batches):
        raise UserError("there is no calibration token; give training examples")
    device, digest = next(model.parameters()).device, fingerprint(model, batches)
    work = hashlib.sha256(repr((digest, needs, temperature, list(modules))).encode()).hexdigest()[
        :16
    ]
    checkpoint = None if checkpoint is None else Path(checkpoint)
    collector = _Collector(modules, needs)
    try:
        with frozen(model):
            done = collector.resume(checkpoint, work, device) if checkpoint is not None else 0
            for index in tqdm(
                range(done, len(batches)),
                initial=done,
                total=len(batches),
                desc="statistics",
                unit="batch",
                disable=not progress,
                leave=False,
            ):
                inputs = model_inputs(batches[index], device)
                # A generator a batch, so that a resumed collection draws what an uninterrupted one would.
                collector.run(model, inputs, temperature, torch.Generator().manual_seed(index))
                if checkpoint is not None and (index + 1) % CHECKPOINT_EVERY == 0:
                    collector.save(checkpoint, index + 1, work)
    finally:
        collector.close()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return collector.statistics(modules, digest)
