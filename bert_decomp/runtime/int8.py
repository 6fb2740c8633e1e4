"""The int8 runtime: the blocks of a fused encoder with their linear layers in 8 bits, calibrated and checked.

Attention, LayerNorm and residuals stay in float32. Each block is compared with what it stands for on the rows that
calibration gave it, and is left in float32 where the difference is too large.
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
from .blocks import (
    ACTIVATIONS,
    AttentionOutput,
    FeedForward,
    QueryKeyValue,
    Workspace,
    layer_norm,
)
from .linears import AlignedLinear, Linear
from .quantised import BALANCES, Int8Linear, choose, weights_of

logger = logging.getLogger("bert_decomp")

# Rows (tokens) that calibrate a block.
ROWS = 2048
# Neurons of a feed-forward that stay in float32.
OUTLIERS = 16
# Largest relative error (Frobenius norm) of a block's result that is accepted.
TOLERANCE = 0.1


class Encoded(nn.Module):
    """Inputs of some linear layers as bytes: multiplied by a balance (in,), then encoded."""

    def __init__(self, sample: Tensor, *linears: Linear):
        super().__init__()
        first = torch.cat([weights_of(linear)[0] for linear in linears])
        self.codes, self.balance = choose(sample, first, BALANCES)
        self.balanced = bool((self.balance != 1).any())

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        if not self.balanced:
            return self.codes.encode(x)
        out = None if workspace is None else workspace.take("balanced", x.shape[0], x.shape[1], x)
        return self.codes.encode(torch.mul(x, self.balance, out=out))

    def linear(self, weights: list[Tensor], bias: Tensor | None, sample: Tensor) -> Int8Linear:
        """The layer in int8 on inputs that this module encodes."""
        return Int8Linear(weights, bias, sample, self.codes, self.balance)


def _bias(linear: Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


class Int8QueryKeyValue(nn.Module):
    """``QueryKeyValue`` in int8; x is encoded once for all three."""

    def __init__(self, block: QueryKeyValue, sample: Tensor):
        super().__init__()
        three = (block.query, block.key, block.value)
        self.encoded = Encoded(sample, *three)
        self.query, self.key, self.value = (
            self.encoded.linear(weights_of(one), _bias(one), sample) for one in three
        )

    def forward(
        self, x: Tensor, asking: Tensor | None = None, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.encoded(x, workspace)
        asking = codes if asking is None else self.encoded(asking, workspace)
        return self.query(asking), self.key(codes), self.value(codes)


class Int8AttentionOutput(nn.Module):
    """``AttentionOutput`` in int8."""

    def __init__(self, block: AttentionOutput, sample: Tensor, _residual: Tensor):
        super().__init__()
        self.encoded, self.norm = Encoded(sample, block.linear), layer_norm(block)
        self.linear = self.encoded.linear(weights_of(block.linear), _bias(block.linear), sample)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.linear.add(self.encoded(context), residual.contiguous()))


class Int8FeedForward(nn.Module):
    """``FeedForward`` in int8: the activation is part of the product, and the neurons never leave their bytes.

    A few neurons of a trained encoder are ten times as large as all others, and one scale for all would leave these few
    values. The ``OUTLIERS`` largest are therefore computed in float32, and are zero among the bytes.
    """

    def __init__(self, block: FeedForward, sample: Tensor):
        super().__init__()
        self.encoded, self.norm = Encoded(sample, block.intermediate), layer_norm(block)
        self.hidden_act = block.activation
        self.activation, _ = ACTIVATIONS[block.activation]
        weights, bias = weights_of(block.intermediate), _bias(block.intermediate)
        neurons = self.overwrite(block.intermediate(sample))
        outliers = neurons.abs().amax(0).topk(min(OUTLIERS, neurons.shape[-1])).indices
        neurons[:, outliers] = 0
        up, second = weights[-1], weights_of(block.output)
        self.first = up[outliers] @ weights[0] if len(weights) == 2 else up[outliers]
        self.first_bias = up.new_zeros(len(outliers)) if bias is None else bias[outliers]
        self.second = second[0][:, outliers]
        if len(second) == 2:
            self.second = second[1] @ self.second
        weights[-1] = up.index_fill(0, outliers, 0)
        bias = None if bias is None else bias.index_fill(0, outliers, 0)
        self.intermediate = self.encoded.linear(weights, bias, sample)
        # The product writes them in one scale, so there is no balance between neurons.
        self.neurons, balance = choose(neurons, second[0], (0.0,))
        self.output = Int8Linear(second, _bias(block.output), neurons, self.neurons, balance)

    def overwrite(self, x: Tensor) -> Tensor:
        """The activation of x in its memory. Looked up, because torch's operators cannot be pickled."""
        return ACTIVATIONS[self.hidden_act][1](x)

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        neurons = self.intermediate(self.encoded(x, workspace), self.neurons, self.activation)
        outliers = self.overwrite(torch.addmm(self.first_bias, x, self.first.t()))
        residual = x.contiguous().addmm_(outliers, self.second.t())
        return self.norm(self.output.add(neurons, residual))


# Block of a fused layer -> its int8 form, made of the block and the rows that it got.
FORMS: dict[type[nn.Module], type[nn.Module]] = {
    QueryKeyValue: Int8QueryKeyValue,
    AttentionOutput: Int8AttentionOutput,
    FeedForward: Int8FeedForward,
}
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


def check_int8(
    model: PreTrainedModel, known: bool, batches: Sequence[dict[str, Tensor]] | None
) -> Sequence[dict[str, Tensor]]:
    """Refuse a model that cannot be int8: ``known`` says whether its architecture has an inference form of its own.

    Returns:
        The batches.

    Raises:
        UserError: the architecture has none, the model is elsewhere or of another dtype, there is no batch, or no
        library.
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
    if not batches:
        raise UserError(
            "int8 needs calibration: batches of the model's inputs, such as text of its task"
        )
    if not torch.backends.mkldnn.is_available():
        raise UserError("int8 needs a torch with oneDNN; this build has none")
    return batches


@torch.no_grad()
def quantise_(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    done: Callable[[], None],
) -> Quality:
    """Put the layers' blocks into int8, in place, and say what it changes.

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
            replacement = form(block, *sample)
            error = _error(block, replacement, sample)
            if error <= TOLERANCE:
                setattr(layer, name, replacement)
                for linear in block.modules():
                    if isinstance(linear, AlignedLinear):
                        linear.release()
            else:
                exact[f"{index}.{name}"] = error
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
    _report(quality)
    return quality


def _report(quality: Quality) -> None:
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
