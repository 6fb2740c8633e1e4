"""What an option of a block costs: weights, multiplications, or milliseconds measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import BlockPlan, LayerPlan, Sizes
from .latency import OperatorTable, Prepare, eager, time_part
from .option import Option

# The cost of a block (by name) with an option, in the unit of the budget.
Cost = Callable[[str, Option], float]

# A head costs time beyond its weights (its softmax), which a budget of weights does not see: as much as this share of
# what a full head weighs.
HEAD_SHARE = 0.2

BLOCK_PARTS = {
    "scores": ("query", "key"),
    "values": ("value", "attention_output"),
    "attention": ("query", "key", "value", "attention_output"),
    "feed_forward": ("ffn_intermediate", "ffn_output"),
}


def weights_cost(sizes: Sizes) -> Cost:
    """The weights of a block with an option."""
    dense = LayerPlan.dense(sizes)

    def cost(block: str, option: Option) -> float:
        matrices = option.apply(dense).matrices(sizes)
        return float(sum(matrices[part].weights for part in BLOCK_PARTS[block] if part in matrices))

    return cost


def flops_cost(sizes: Sizes, length: int) -> Cost:
    """Multiplications and additions a token of a block with an option, in sentences of ``length`` tokens."""
    weights, dense = weights_cost(sizes), LayerPlan.dense(sizes)

    def cost(block: str, option: Option) -> float:
        plan = option.apply(dense)
        attention = {
            "scores": plan.score_size,
            "values": plan.value_size,
            "attention": plan.score_size + plan.value_size,
            "feed_forward": 0,
        }[block]
        return 2 * weights(block, option) + 2 * length * len(plan.heads) * attention

    return cost


def _points(full: int, count: int) -> list[int]:
    """About ``count`` sizes from 1 to ``full``, evenly spread."""
    return sorted({1, *(max(1, round(full * part / count)) for part in range(1, count + 1))})


class _Attention(nn.Module):
    """Queries, keys and values (batch, tokens, heads, size) to context (batch, tokens, width)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@dataclass
class BlockTable:
    """Measured milliseconds of a layer's parts on batches of ``batch_size`` sentences of ``length`` tokens, in the
    engine of ``prepare``.

    Dense matrices, the activation and attention are measured at a few sizes and interpolated between them; two factors
    as ``OperatorTable`` has them.
    """

    sizes: Sizes
    batch_size: int
    length: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    prepare: Prepare = eager
    progress: bool = False
    _linear: dict[bool, Callable[[float], float]] = field(default_factory=dict)
    _attention: Callable[[tuple[float, float, float]], float] = field(init=False)
    _activation: Callable[[float], float] = field(init=False)
    _bar: tqdm = field(init=False)
    _known: dict[tuple, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.batch_size * self.length
        self._operators = OperatorTable(rows, self.device, self.dtype, prepare=self.prepare)
        widest = max(
            self.sizes.heads * self.sizes.head_size,
            self.sizes.neurons * (2 if self.sizes.gated else 1),
        )
        widths, neurons = _points(widest, 12), _points(self.sizes.neurons, 4)
        heads, dims = _points(self.sizes.heads, 3), _points(self.sizes.head_size, 3)
        count = 2 * len(widths) + len(neurons) + len(heads) * len(dims) ** 2
        self._bar = tqdm(
            total=count, desc="times", unit="shape", disable=not self.progress, leave=False
        )
        for outwards in (True, False):
            times = [
                self._time_linear(*((self.sizes.width, n) if outwards else (n, self.sizes.width)))
                for n in widths
            ]
            self._linear[outwards] = partial(np.interp, xp=widths, fp=times)
        times = [self._time(nn.GELU(), self._random(rows, n)) for n in neurons]
        self._activation = partial(np.interp, xp=neurons, fp=times)
        grid = np.array(
            [
                [[self._time_attention(h, score, value) for value in dims] for score in dims]
                for h in heads
            ]
        )
        self._bar.close()
        interpolate = RegularGridInterpolator((heads, dims, dims), grid)
        self._attention = lambda point: interpolate(point).item()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def _time(self, module: nn.Module, *inputs: Tensor) -> float:
        self._bar.update()
        return time_part(self.prepare, module, *inputs)

    def _time_linear(self, columns: int, rows: int) -> float:
        layer = nn.Linear(columns, rows, device=self.device, dtype=self.dtype)
        return self._time(layer, self._random(self.batch_size * self.length, columns))

    def _time_attention(self, heads: int, score_size: int, value_size: int) -> float:
        sizes = (score_size, score_size, value_size)
        inputs = (self._random(self.batch_size, self.length, heads, size) for size in sizes)
        return self._time(_Attention(), *inputs)

    def part(self, name: str, plan: LayerPlan) -> float:
        """Milliseconds of one of a layer's matrices."""
        entry = plan.matrices(self.sizes).get(name)
        if entry is None:
            return 0.0
        if entry.rank is not None:
            return 1e3 * self._operators.of(entry)
        outwards = name not in ("attention_output", "ffn_output")
        size = entry.out_features if outwards else entry.in_features
        return float(self._linear[outwards](size))

    def attention(self, plan: LayerPlan) -> float:
        """Milliseconds of a layer's attention between its matrices."""
        if not plan.heads:
            return 0.0
        key = (len(plan.heads), plan.score_size, plan.value_size)
        if key not in self._known:
            self._known[key] = self._attention(key)
        return self._known[key]

    def layer(self, plan: LayerPlan) -> float:
        """Milliseconds of a layer, its normalisation and sums apart."""
        activation = float(self._activation(plan.neurons)) if plan.neurons else 0.0
        return (
            sum(self.part(part, plan) for part in plan.shapes(self.sizes))
            + self.attention(plan)
            + activation
        )

    def total(self, plan: BlockPlan) -> float:
        """Milliseconds of all layers of a plan."""
        return sum(self.layer(layer) for layer in plan.layers.values())

    def cost(self, block: str, option: Option) -> float:
        """Milliseconds of a block with an option. Scores and values that are chosen apart share the time of attention:
        each has half of the dense one's, less what its own size saves."""
        dense = LayerPlan.dense(self.sizes)
        plan = option.apply(dense)
        linear = sum(self.part(part, plan) for part in BLOCK_PARTS[block])
        if block == "feed_forward":
            return linear + (float(self._activation(plan.neurons)) if plan.neurons else 0.0)
        if block == "attention":
            return linear + self.attention(plan)
        return linear + self.attention(plan) - self.attention(dense) / 2
