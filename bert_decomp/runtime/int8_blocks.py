"""The blocks of a fused encoder layer with their linear layers in 8 bits.

Each is made of stored tensors, which come from a file or from calibration: ``calibrated`` makes them of the block in
float32 and the rows that it got. Attention, LayerNorm and residuals stay in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.int8 import QuantisedLinear
from .blocks import (
    ACTIVATIONS,
    AttentionOutput,
    FeedForward,
    QueryKeyValue,
    Workspace,
    layer_norm,
)
from .linears import Linear
from .quantised import BALANCES, Codes, Int8Linear, choose, quantised, weights_of

# Neurons of a feed-forward that stay in floating point.
OUTLIERS = 16


class Encoded(nn.Module):
    """Inputs of linear layers as bytes: multiplied by a balance (in,), then encoded; all layers agree on how.

    Raises:
        UserError: they do not.
    """

    def __init__(self, *stored: QuantisedLinear):
        super().__init__()
        first = stored[0]
        for other in stored[1:]:
            if not (
                torch.equal(other.inputs, first.inputs)
                and torch.equal(other.balance, first.balance)
            ):
                raise UserError("the model has query, key and value that take different bytes")
        self.codes, self.balance = Codes.between(*first.inputs.tolist()), first.balance
        self.balanced = bool((self.balance != 1).any())

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        if not self.balanced:
            return self.codes.encode(x)
        out = None if workspace is None else workspace.take("balanced", x.shape[0], x.shape[1], x)
        return self.codes.encode(torch.mul(x, self.balance, out=out))


def calibrated(sample: Tensor, *linears: Linear) -> list[QuantisedLinear]:
    """Linear layers in 8 bits that share their inputs, calibrated on a sample (rows, in) of them."""
    limits, balance = choose(sample, torch.cat([weights_of(one)[0] for one in linears]), BALANCES)
    return [quantised(weights_of(one), _bias(one), sample, limits, balance) for one in linears]


def _bias(linear: Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


class Int8Block(nn.Module):
    """A block in 8 bits."""

    def stored(self) -> dict[str, QuantisedLinear]:
        """Its linear layers by the names of ``architectures.LINEARS``."""
        raise NotImplementedError


class Int8QueryKeyValue(Int8Block):
    """``QueryKeyValue`` in int8; x is encoded once for all three."""

    def __init__(self, query: QuantisedLinear, key: QuantisedLinear, value: QuantisedLinear):
        super().__init__()
        self.encoded = Encoded(query, key, value)
        self.query, self.key, self.value = map(Int8Linear, (query, key, value))

    @classmethod
    def calibrated(cls, block: QueryKeyValue, sample: Tensor) -> Int8QueryKeyValue:
        """The block in 8 bits, calibrated on rows (rows, width) that it got."""
        return cls(*calibrated(sample, block.query, block.key, block.value))

    def stored(self) -> dict[str, QuantisedLinear]:
        return {name: getattr(self, name).stored for name in ("query", "key", "value")}

    def forward(
        self, x: Tensor, asking: Tensor | None = None, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.encoded(x, workspace)
        asking = codes if asking is None else self.encoded(asking, workspace)
        return self.query(asking), self.key(codes), self.value(codes)


class Int8AttentionOutput(Int8Block):
    """``AttentionOutput`` in int8."""

    def __init__(self, linear: QuantisedLinear, norm: nn.LayerNorm):
        super().__init__()
        self.encoded, self.linear, self.norm = Encoded(linear), Int8Linear(linear), norm

    @classmethod
    def calibrated(
        cls, block: AttentionOutput, sample: Tensor, _residual: Tensor
    ) -> Int8AttentionOutput:
        """The block in 8 bits, calibrated on rows (rows, width) that it got."""
        (linear,) = calibrated(sample, block.linear)
        return cls(linear, layer_norm(block))

    def stored(self) -> dict[str, QuantisedLinear]:
        return {"attention_output": self.linear.stored}

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.linear.add(self.encoded(context), residual.contiguous()))


class Int8FeedForward(Int8Block):
    """``FeedForward`` in int8: the activation is part of the product, and the neurons never leave their bytes.

    A few neurons of a trained encoder are ten times as large as all others, and one scale for all would leave these few
    values. The ``OUTLIERS`` largest are therefore computed in float32, and are zero among the bytes.

    Raises:
        UserError: there is no such activation in int8, or the two halves do not fit together.
    """

    def __init__(
        self,
        intermediate: QuantisedLinear,
        output: QuantisedLinear,
        activation: str,
        norm: nn.LayerNorm,
    ):
        super().__init__()
        if activation not in ACTIVATIONS or not intermediate.outliers:
            raise UserError(f"a feed-forward with {activation} has no int8 form like the model's")
        self.encoded, self.norm, self.hidden_act = Encoded(intermediate), norm, activation
        self.activation, _ = ACTIVATIONS[activation]
        self.intermediate, self.output = Int8Linear(intermediate), Int8Linear(output)
        self.neurons = Codes.between(*output.inputs.tolist())
        self.first, self.first_bias, self.second = (
            one.float()
            for one in (
                intermediate.outlier_in,
                intermediate.outlier_bias,
                intermediate.outlier_out,
            )
        )

    @classmethod
    def calibrated(cls, block: FeedForward, sample: Tensor) -> Int8FeedForward:
        """The block in 8 bits, calibrated on rows (rows, width) that it got."""
        _, overwrite = ACTIVATIONS[block.activation]
        weights, bias = weights_of(block.intermediate), _bias(block.intermediate)
        neurons = overwrite(block.intermediate(sample))
        count = min(OUTLIERS, neurons.shape[-1])
        outliers = neurons.abs().amax(0).topk(count).indices
        neurons[:, outliers] = 0
        up, second = weights[-1], weights_of(block.output)
        first = up[outliers] @ weights[0] if len(weights) == 2 else up[outliers]
        first_bias = up.new_zeros(count) if bias is None else bias[outliers]
        rest = second[0][:, outliers]
        rest = second[1] @ rest if len(second) == 2 else rest
        limits, balance = choose(sample, weights[0], BALANCES)
        weights[-1] = up.index_fill(0, outliers, 0)
        bias = None if bias is None else bias.index_fill(0, outliers, 0)
        intermediate = quantised(weights, bias, sample, limits, balance)
        intermediate.set_outliers(first.half(), first_bias.half(), rest.half())
        # The product writes them in one scale, so there is no balance between neurons.
        limits, balance = choose(neurons, second[0], (0.0,))
        output = quantised(second, _bias(block.output), neurons, limits, balance)
        return cls(intermediate, output, block.activation, layer_norm(block))

    def stored(self) -> dict[str, QuantisedLinear]:
        return {"ffn_intermediate": self.intermediate.stored, "ffn_output": self.output.stored}

    def overwrite(self, x: Tensor) -> Tensor:
        """The activation of x in its memory. Looked up, because torch's operators cannot be pickled."""
        return ACTIVATIONS[self.hidden_act][1](x)

    def forward(self, x: Tensor, workspace: Workspace | None = None) -> Tensor:
        neurons = self.intermediate(self.encoded(x, workspace), self.neurons, self.activation)
        outliers = self.overwrite(torch.addmm(self.first_bias, x, self.first.t()))
        residual = x.contiguous().addmm_(outliers, self.second.t())
        return self.norm(self.output.add(neurons, residual))


# Block of a fused layer -> its int8 form.
FORMS: dict[type[nn.Module], type[Int8QueryKeyValue | Int8AttentionOutput | Int8FeedForward]] = {
    QueryKeyValue: Int8QueryKeyValue,
    AttentionOutput: Int8AttentionOutput,
    FeedForward: Int8FeedForward,
}
