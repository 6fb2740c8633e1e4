"""Gathering statistics while a model runs over calibration batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..kinds import model_inputs
from .collector import WEIGHTS, Collector
from .gradients import TEMPERATURE, frozen
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


class _Weights(Collector):
    """Of all that can be collected, only how much each token counts."""

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self._note_weights(name, gradient)


def token_weights(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    statistics: Statistics | None = None,
    *,
    temperature: float = TEMPERATURE,
    progress: bool = True,
) -> dict[str, list[Tensor]]:
    """By layer and batch, the clipped |g|^2 of every real token (tokens,), with the classes that ``collect_statistics``
    draws for the same batches.

    Args:
        statistics: if they are of this model and these batches, and hold the weights, they spare the backward passes.
    """
    device = next(model.parameters()).device
    if statistics is not None and statistics.fingerprint == fingerprint(model, batches):
        counts = [int(batch["attention_mask"].sum()) for batch in batches]
        kept = {
            name: part.token_weights
            for name, part in statistics.gradients.items()
            if part.token_weights is not None and len(part.token_weights) == sum(counts)
        }
        if set(modules) <= set(kept):
            return {name: list(kept[name].float().to(device).split(counts)) for name in modules}
    collector = _Weights(modules, ("gradients",))
    try:
        with frozen(model):
            for index, batch in enumerate(
                tqdm(batches, desc="token weights", disable=not progress, leave=False)
            ):
                inputs = model_inputs(batch, device)
                collector.run(model, inputs, temperature, torch.Generator().manual_seed(index))
    finally:
        collector.close()
    return collector.token_weights


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
            model, data and needs continues; removed at the end.

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
    about = (digest, needs, temperature, list(modules), WEIGHTS)
    work = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    checkpoint = None if checkpoint is None else Path(checkpoint)
    collector = Collector(modules, needs)
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
