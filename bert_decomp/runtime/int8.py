"""Putting a fused model into int8: its blocks (see ``int8_blocks``) and its word embedding, calibrated and checked.

Each block is compared with what it stands for on the rows that calibration gave it, and is left in float32 where the
difference is too large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..kinds import kind_of, model_inputs
from ..models.embedding import LowRankEmbedding
from ..models.int8 import QuantisedEmbedding
from ..models.replacement import Replacement
from .blocks import ACTIVATIONS, AttentionOutput
from .int8_blocks import FORMS
from .linears import AlignedLinear

logger = logging.getLogger("bert_decomp")

# Rows (tokens) that calibrate a block.
ROWS = 2048
# Largest relative error (Frobenius norm) of a block's result that is accepted.
TOLERANCE = 0.1

BLOCKS = ("query_key_value", "attention_output", "feed_forward")


@dataclass(frozen=True)
class Quality:
    """What int8 changes on the calibration batches.

    Attributes:
        difference: of the model's first output (logits), norm over norm.
        agreement: share of the same decisions (of classes, or of each label); None for a model that decides nothing.
        exact: blocks that stay in float32, by name, with the relative error that they would have had in int8.
    """

    difference: float
    agreement: float | None
    exact: dict[str, float]


class Int8Embedding(Replacement):
    """The word embedding in 8 bits: on all-MiniLM-L6-v2 it costs a tenth of what the encoder's layers cost."""

    def __init__(self, source: nn.Embedding | LowRankEmbedding):
        super().__init__(source)
        self.rows = QuantisedEmbedding.of(source)

    def stored(self) -> dict[str, nn.Module]:
        return {"": self.rows}

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


class _Samples:
    """The first rows that each block gets, up to ``ROWS``, spread over the batches."""

    def __init__(self, layers: nn.ModuleList, batches: int):
        self.each = -(-ROWS // batches)
        self.rows: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
        blocks = [getattr(layer, name) for layer in layers for name in BLOCKS]
        self.blocks = [block for block in blocks if type(block) in FORMS]
        self.handles = [block.register_forward_pre_hook(self._keep) for block in self.blocks]

    def _keep(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Of the residual, the rows of the context; of queries of first tokens, nothing that other rows lack.
        taken = inputs[:2] if isinstance(block, AttentionOutput) else inputs[:1]
        step = -(-len(taken[0]) // self.each)
        self.rows.setdefault(block, []).append(tuple(x[::step].clone() for x in taken))

    def of(self, block: nn.Module) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*self.rows[block], strict=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _first_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return kind_of(model).raw(model(**model_inputs(batch)))


def _error(block: nn.Module, form: nn.Module, sample: tuple[Tensor, ...]) -> float:
    """Largest relative error of the form's results on the sample, which blocks may overwrite."""
    exact, result = (one(*(x.clone() for x in sample)) for one in (block, form))
    if isinstance(exact, Tensor):
        exact, result = (exact,), (result,)
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(exact, result, strict=True))


def _quantise_embedding(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Put the word embedding into 8 bits, in place, unless a head shares it; its error where that is too large."""
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings() is not None or not isinstance(
        embedding, (nn.Embedding, LowRankEmbedding)
    ):
        return {}
    form = Int8Embedding(embedding)
    error = _error(
        embedding, form, (torch.cat([batch["input_ids"].flatten() for batch in batches]),)
    )
    if error > TOLERANCE:
        return {"word_embedding": error}
    model.set_input_embeddings(form)
    return {}


def check_batches(batches: Sequence[dict[str, Tensor]] | None) -> Sequence[dict[str, Tensor]]:
    """Batches to calibrate on, of which there must be one.

    Raises:
        UserError: there is none.
    """
    if not batches:
        raise UserError(
            "int8 needs calibration: batches of the model's inputs, such as text of its task"
        )
    return batches


def check_int8(model: PreTrainedModel, known: bool) -> None:
    """Refuse a model that cannot be int8: ``known`` says whether its architecture has an inference form of its own.

    Raises:
        UserError: the architecture has none, the model is elsewhere or of another dtype, or there is no library.
    """
    parameter = next(model.parameters())
    if not known:
        raise UserError(
            f"int8 is not for {model.config.model_type}, whose layers have no inference form"
        )
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise UserError(
            f"int8 needs a float32 model on the CPU, and this one is {parameter.dtype} on {parameter.device}; "
            "move it with .float().cpu()"
        )
    if not torch.backends.mkldnn.is_available():
        raise UserError("int8 needs a torch with oneDNN; this build has none")


@torch.no_grad()
def quantise_(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    done: Callable[[], None],
) -> Quality:
    """Put the layers' blocks and the word embedding into int8, in place, and say what it changes.

    Args:
        model: what ``layers`` belong to, in float32 on the CPU.
        layers: fused encoder layers.
        batches: inputs of the model, at least one batch; labels are ignored.
        done: called when the blocks are int8, before the model is run again.
    """
    samples = _Samples(layers, len(batches))
    try:
        before = [_first_output(model, batch) for batch in batches]
    finally:
        samples.close()
    exact = {}
    for index, layer in enumerate(layers):
        for name in BLOCKS:
            block = getattr(layer, name)
            form = FORMS.get(type(block))
            if form is None or getattr(block, "activation", "gelu") not in ACTIVATIONS:
                continue
            sample = samples.of(block)
            replacement = form.calibrated(block, *sample)
            error = _error(block, replacement, sample)
            if error <= TOLERANCE:
                setattr(layer, name, replacement)
                for linear in block.modules():
                    if isinstance(linear, AlignedLinear):
                        linear.release()
            else:
                exact[f"{index}.{name}"] = error
    exact.update(_quantise_embedding(model, batches))
    done()
    after = [_first_output(model, batch) for batch in batches]
    was, now = (torch.cat([x.flatten(0, -2) for x in outputs]) for outputs in (before, after))
    decided = [kind_of(model).decisions(answers) for answers in (now, was)]
    agreement = None
    # Of answers for every token, those of padding would count.
    if before[0].ndim == 2 and decided[0] is not None and decided[1] is not None:
        agreement = (decided[0] == decided[1]).double().mean().item()
    quality = Quality(
        ((now - was).norm() / was.norm()).item(),
        agreement,
        exact,
    )
    report(quality)
    return quality


def report(quality: Quality) -> None:
    """Log what int8 changes."""
    if quality.exact:
        logger.warning(
            "int8: left in float32, because the error would be above %g: %s",
            TOLERANCE,
            ", ".join(f"{name} ({error:.2f})" for name, error in quality.exact.items()),
        )
    logger.info(
        "int8: outputs differ by %.1f %% on the calibration batches%s",
        100 * quality.difference,
        ""
        if quality.agreement is None
        else f"; {100 * quality.agreement:.1f} % of the decisions are the same",
    )
