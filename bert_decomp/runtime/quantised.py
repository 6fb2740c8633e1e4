"""8-bit arithmetic of the int8 runtime: ranges, and linear layers whose products oneDNN computes in int8.

A tensor x is kept as unsigned bytes q with x = scale (q - zero); one scale and zero point a tensor, fixed by
calibration, so that a product's result leaves it as bytes for the next product. Weights are signed bytes with one scale
an output channel. Channels that differ in size are balanced first, which changes nothing in exact arithmetic
(SmoothQuant, arXiv 2211.10438): W x = (W / m) (m x), and between two factors up h = (up / t) (t h), where it costs
nothing.

Where the processor lacks VNNI, or the library is told not to use it, pairs of products are added in 16 bits, which
255 * 127 overflows. There activations use 7 bits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..models.int8 import QuantisedLinear, quantised_rows
from .linears import AlignedLinear, Linear

# Exponents of the balance between channels that are tried: 0 leaves them, 1 makes all activations one size.
BALANCES = (0.0, 0.5, 0.75)
# Shares of the largest value at which values may be cut off for a finer scale.
CUTS = (1.0, 0.85, 0.7, 0.5)
# Rows of a sample on which a choice is made.
CHOICE_ROWS = 512
# oneDNN's names of activations, by lowrank_kernels': (operation, algorithm).
ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


@cache
def largest_code() -> int:
    """The largest byte that an activation may have on this processor.

    oneDNN may be told to leave its best instructions alone (ONEDNN_MAX_CPU_ISA), so that products of the largest bytes
    are tried.
    """
    wide = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return 255 if wide and all(_is_exact(255, rows) for rows in (1, 16)) else 127


def _is_exact(code: int, rows: int) -> bool:
    """Whether oneDNN's sum of 64 products of ``code`` and the largest weight is their sum."""
    x, weight = torch.full((rows, 64), code).byte(), torch.full((16, 64), 127).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y == 64 * 127 * code).all())


@dataclass(frozen=True)
class Codes:
    """Real value = scale * (byte - zero), bytes from 0 to ``top``."""

    scale: float
    zero: int
    top: int

    @classmethod
    def between(cls, low: float, high: float) -> Codes:
        """Codes that span [low, high] and 0, with as many bytes as this processor can take."""
        low, high, top = min(low, 0.0), max(high, 0.0), largest_code()
        scale = max(high - low, 1e-12) / top
        return cls(scale, round(-low / scale), top)

    def rounded(self, x: Tensor) -> Tensor:
        """What is left of x after it was encoded and decoded."""
        return ((x / self.scale).round() + self.zero).clamp(0, self.top).sub(self.zero) * self.scale

    def encode(self, x: Tensor) -> Tensor:
        """x as bytes, uint8."""
        with warnings.catch_warnings():
            # torch has no other call that rounds, clamps and converts in one pass; the quantised tensor is only viewed.
            warnings.simplefilter("ignore")
            codes = torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8)
        bytes_ = torch.empty(0, dtype=torch.uint8)
        bytes_.set_(codes.untyped_storage(), 0, codes.shape, codes.stride())
        return self.clamped(bytes_)

    def clamped(self, codes: Tensor) -> Tensor:
        """Bytes cut off at ``top``, in place; a library cuts off at 255."""
        return codes if self.top == 255 else codes.clamp_(max=self.top)


class Product:
    """x W^T + bias for bytes x (rows, in), as bytes, as float32, or added to a float32 tensor.

    W (out, in) is ``scale`` (out,) times the int8 ``weight``.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, source: Codes):
        self.weight, self.scale, self.bias, self.source = weight, scale, bias, source
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's own layout can be neither copied nor saved; it is made again.
        return {**self.__dict__, "_packed": None}

    def unpack(self) -> None:
        """Free oneDNN's copy of the weights; the next call makes it again."""
        self._packed = None

    def _operands(self, x: Tensor) -> tuple[Any, ...]:
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        return x, self.source.scale, self.source.zero, self._packed, self.scale, self.zero

    def __call__(self, x: Tensor, result: Codes | None = None, activation: str = "none") -> Tensor:
        """activation(x W^T + bias), encoded by ``result``; float32 without it."""
        operation, algorithm = ACTIVATIONS[activation]
        scale, zero, dtype = (
            (1.0, 0, torch.float32) if result is None else (result.scale, result.zero, torch.uint8)
        )
        y = torch.ops.onednn.qlinear_pointwise(
            *self._operands(x), self.bias, scale, zero, dtype, operation, [], algorithm
        )
        return y if result is None else result.clamped(y)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T + bias, float32, in the memory of ``residual``, which is contiguous."""
        return torch.ops.onednn.qlinear_pointwise.binary(
            *self._operands(x),
            residual,
            self.bias,
            1.0,
            0,
            torch.float32,
            1.0,
            0,
            "sum",
            1.0,
            "none",
            [],
            "",
        )


class Int8Linear(nn.Module):
    """A dense layer or a factor pair on bytes; the intermediate of a pair stays bytes.

    Args:
        stored: its tensors; inputs are bytes as it says.
    """

    def __init__(self, stored: QuantisedLinear):
        super().__init__()
        self.stored = stored
        self.inner: Codes | None = None
        source = Codes.between(*stored.inputs.tolist())
        if not stored.rank:
            self.products = [Product(stored.up, stored.up_scale, stored.bias, source)]
            return
        self.inner = Codes.between(*stored.inner.tolist())
        self.products = [
            Product(stored.down, stored.down_scale, None, source),
            Product(stored.up, stored.up_scale, stored.bias, self.inner),
        ]

    def _last(self, x: Tensor) -> tuple[Product, Tensor]:
        if self.inner is None:
            return self.products[0], x
        return self.products[1], self.products[0](x, self.inner)

    def forward(self, x: Tensor, result: Codes | None = None, activation: str = "none") -> Tensor:
        """activation of the layer on bytes x (rows, in); float32, or bytes encoded by ``result``."""
        product, x = self._last(x)
        return product(x, result, activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the layer on bytes x, in the memory of ``residual``."""
        product, x = self._last(x)
        return product.add(x, residual)


def weights_of(linear: Linear) -> list[Tensor]:
    """The matrix of a dense layer, or the factors of an aligned one."""
    if isinstance(linear, AlignedLinear):
        return [linear.down, linear.up]
    return [linear.weight.detach()]


def quantised(
    weights: list[Tensor], bias: Tensor | None, sample: Tensor, limits: Tensor, balance: Tensor
) -> QuantisedLinear:
    """A linear layer in 8 bits, calibrated on a sample.

    Args:
        weights: one matrix (out, in), or the factors down (rank, in) and up (out, rank).
        bias: (out,) or None.
        sample: inputs (rows, in) as the layer sees them.
        limits, balance: how inputs become bytes; see ``choose``.
    """
    rank = len(weights[0]) if len(weights) == 2 else 0
    result = QuantisedLinear(weights[0].shape[1], len(weights[-1]), rank, bias is not None)
    # Copies: query, key and value have these in common, and files hold nothing twice.
    result.inputs, result.balance, result.bias = limits.clone(), balance.clone(), bias
    if not rank:
        result.up, result.up_scale = quantised_rows(weights[0] / balance)
        return result
    down, up = weights
    result.inner, between = choose(sample @ down.t(), up, BALANCES)
    result.down, result.down_scale = quantised_rows(between[:, None] * down / balance)
    result.up, result.up_scale = quantised_rows(up / between)
    return result


def choose(sample: Tensor, weight: Tensor, exponents: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Limits (low, high) and balance (in,) for inputs of ``weight`` (out, in), of least squared error on ``sample``.

    Inputs are to be multiplied by the balance and encoded by ``Codes.between(low, high)``.
    """
    sample = sample[:: -(-len(sample) // CHOICE_ROWS)]
    exact, choices = sample @ weight.t(), []
    for exponent in exponents:
        balance = channel_balance(sample, weight, exponent)
        x, w = sample * balance, weight / balance
        rows, scale = quantised_rows(w)
        w = rows * scale[:, None]
        for cut in CUTS:
            limits = cut * torch.stack([x.min(), x.max()])
            codes = Codes.between(*limits.tolist())
            error = (codes.rounded(x) @ w.t() - exact).square().sum().item()
            choices.append((error, limits, balance))
    return min(choices, key=lambda choice: choice[0])[1:]


def channel_balance(sample: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """Multipliers (in,) for inputs ``sample`` (rows, in) of ``weight`` (out, in).

    |w|^(1-e) / |x|^e by channel, e the exponent; 1 for e = 0.
    """
    x, w = sample.abs().amax(0), weight.abs().amax(0)
    if exponent == 0:
        return torch.ones_like(x)
    usable = (x > 0) & (w > 0)
    return torch.where(usable, w.pow(1 - exponent) / x.clamp_min(1e-12).pow(exponent), 1.0)
