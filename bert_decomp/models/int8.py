"""What a file holds of a linear layer or of the word embedding in 8 bits; ``runtime`` computes with it.

Weights are signed bytes with a scale for each row. Of the bytes of activations a file has the range that they span, not
the scale: how many of the 256 values may be used depends on the processor that loads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .embedding import LowRankEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ranks are padded to a multiple of it (see ``lowrank_kernels.align_factors``).
RANK_STEP = 16


class QuantisedLinear(nn.Module):
    """A linear layer, or a pair of factors, in 8 bits; it holds tensors and computes nothing.

    ``up`` (out, in), of a pair (out, rank), and ``down`` (rank, in) are int8; row i stands for ``up_scale[i]`` times
    its bytes. Inputs are multiplied by ``balance`` (in,) before they become bytes that span ``inputs`` = (low, high);
    the values between two factors span ``inner``. ``bias`` (out,) is float32.

    The first half of a feed-forward has besides, in float16, what its ``outliers`` largest neurons need:
    ``outlier_in`` (outliers, in), ``outlier_bias`` (outliers,) and ``outlier_out`` (in, outliers).

    >>> layer = QuantisedLinear(8, 3, rank=2)
    >>> {name: tuple(value.shape) for name, value in layer.state_dict().items() if value.dtype == torch.int8}
    {'up': (3, 2), 'down': (2, 8)}

    Args:
        rank: of a pair of factors; 0 for one matrix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 0,
        bias: bool = True,
        outliers: int = 0,
        device: Any = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.outliers = rank, outliers

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        buffer("balance", in_features)
        buffer("inputs", 2)
        buffer("up", out_features, rank or in_features, dtype=torch.int8)
        buffer("up_scale", out_features)
        if rank:
            buffer("down", rank, in_features, dtype=torch.int8)
            buffer("down_scale", rank)
            buffer("inner", 2)
        if bias:
            buffer("bias", out_features)
        else:
            self.bias = None
        if outliers:
            buffer("outlier_in", outliers, in_features, dtype=torch.float16)
            buffer("outlier_bias", outliers, dtype=torch.float16)
            buffer("outlier_out", in_features, outliers, dtype=torch.float16)

    balance: Tensor
    inputs: Tensor
    up: Tensor
    up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    inner: Tensor
    bias: Tensor | None
    outlier_in: Tensor
    outlier_bias: Tensor
    outlier_out: Tensor

    def set_outliers(self, first: Tensor, bias: Tensor, second: Tensor) -> None:
        """Keep a feed-forward's largest neurons by themselves: (outliers, in), (outliers,) and (in, outliers)."""
        self.outliers = len(first)
        for name, value in (("in", first), ("bias", bias), ("out", second)):
            self.register_buffer(f"outlier_{name}", value)

    def describe(self) -> dict[str, Any]:
        """The entry of a config that ``rebuild_int8_`` takes."""
        return {
            "int8": "linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
            "outliers": self.outliers,
        }


class QuantisedEmbedding(nn.Module):
    """The word embedding in 8 bits: y = scale[ids] codes[ids], and up^T and bias after it where it was factored.

    ``codes`` (num_embeddings, embedding_dim or rank) int8; ``scale`` (num_embeddings,), ``up`` (embedding_dim, rank)
    and ``bias`` (embedding_dim,) float32.

    >>> dense = nn.Embedding(9, 4)
    >>> ids = torch.tensor([[3, 8]])
    >>> bool((QuantisedEmbedding.of(dense)(ids) - dense(ids)).abs().max() < 0.02)
    True
    """

    codes: Tensor
    scale: Tensor
    up: Tensor | None
    bias: Tensor | None

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int = 0, device: Any = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        codes = torch.zeros(num_embeddings, rank or embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.zeros(num_embeddings, device=device))
        up, bias = torch.zeros(embedding_dim, rank), torch.zeros(embedding_dim)
        self.register_buffer("up", up.to(device) if rank else None)
        self.register_buffer("bias", bias.to(device) if rank else None)

    @classmethod
    def of(cls, embedding: nn.Embedding | LowRankEmbedding) -> QuantisedEmbedding:
        """A dense or factored embedding (float32) in 8 bits."""
        rows, rank = (
            (embedding.codes, embedding.rank)
            if isinstance(embedding, LowRankEmbedding)
            else (embedding.weight, 0)
        )
        self = cls(embedding.num_embeddings, embedding.embedding_dim, rank)
        self.codes, self.scale = quantised_rows(rows.detach())
        if isinstance(embedding, LowRankEmbedding):
            self.up, self.bias = embedding.up.detach(), embedding.bias.detach()
        return self

    def forward(self, ids: Tensor) -> Tensor:
        # On a CPU the product of two dtypes, and indexing of bytes, take many times as long.
        rows = F.embedding(ids, self.codes).float().mul_(F.embedding(ids, self.scale[:, None]))
        return rows if self.up is None else F.linear(rows, self.up, self.bias)

    def describe(self) -> dict[str, Any]:
        """The entry of a config that ``rebuild_int8_`` takes."""
        return {"int8": "embedding", "rank": self.rank}


QUANTISED = (QuantisedLinear, QuantisedEmbedding)
# Entry of a config -> the type of each of its values.
ENTRIES: dict[str, dict[str, type]] = {
    "linear": {"in_features": int, "out_features": int, "rank": int, "bias": bool, "outliers": int},
    "embedding": {"rank": int},
}


def quantised_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (rows, columns) as int8 and the scale (rows,) of each row: the largest value of a row becomes 127.

    >>> quantised_rows(torch.tensor([[1.0, -0.5]]))
    (tensor([[127, -64]], dtype=torch.int8), tensor([0.0079]))
    """
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def is_entry(entry: Any) -> bool:
    """Whether ``entry`` has the form of what ``describe`` gives."""
    values = ENTRIES.get(entry.get("int8")) if _is_named(entry) else None
    return (
        values is not None
        and set(entry) == {"int8", *values}
        # type(), because True is an int, too.
        and all(type(entry[name]) is kind for name, kind in values.items())
        and all(entry[name] >= 0 for name, kind in values.items() if kind is int)
    )


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("int8"), str)


def rebuild_int8_(model: PreTrainedModel, name: str, entry: dict[str, Any]) -> None:
    """Put a quantised module, yet without values, in the place of the dense one.

    Args:
        name: of a module of ``model``, dense so far.
        entry: what ``describe`` gave.

    Raises:
        UserError: that module cannot be in 8 bits, or not in those sizes.
    """
    try:
        dense = model.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"the model's config has {name} in int8, which it does not have") from error
    quantised: nn.Module
    if entry["int8"] == "embedding":
        if type(dense) is not nn.Embedding or dense is not model.get_input_embeddings():
            raise UserError(f"the model's config has {name} in int8, not its word embedding")
        rows, columns = dense.num_embeddings, dense.embedding_dim
        if entry["rank"] > min(rows, columns):
            raise _wrong_size(name, entry, columns, rows)
        quantised = QuantisedEmbedding(rows, columns, entry["rank"], dense.weight.device)
    else:
        if type(dense) is not nn.Linear:
            raise UserError(f"the model's config has {name} in int8, not a linear layer")
        columns, rows, rank = entry["in_features"], entry["out_features"], entry["rank"]
        if (
            not 1 <= columns <= dense.in_features
            or not 1 <= rows <= dense.out_features
            or rank > -(-min(columns, rows) // RANK_STEP) * RANK_STEP
            or entry["outliers"] > rows
        ):
            raise _wrong_size(name, entry, dense.in_features, dense.out_features)
        quantised = QuantisedLinear(
            columns, rows, rank, entry["bias"], entry["outliers"], dense.weight.device
        )
    model.set_submodule(name, quantised)


def _wrong_size(name: str, entry: dict[str, Any], columns: int, rows: int) -> UserError:
    return UserError(
        f"the model's config gives {name} ({columns}x{rows}) the sizes {entry} in int8, which it cannot have"
    )


def check_quantised(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise UserError if the values of a quantised module, given with its name, cannot be."""
    for name, module in modules:
        if not isinstance(module, QUANTISED):
            continue
        for key, value in module.state_dict().items():
            positive = key == "balance" or key.endswith("scale")
            if key in ("inputs", "inner"):
                low, high = value.tolist()
                right = math.isfinite(low) and math.isfinite(high) and low <= high
            else:
                right = not value.is_floating_point() or bool(value.isfinite().all())
            if not right or (positive and not bool((value > 0).all())):
                raise UserError(
                    f"the model has values in {name}.{key} that cannot be; save it in int8 again"
                )


def check_quality(quality: Any) -> None:
    """Raise UserError if what a config says of the loss by int8 is not what ``LowRankConfig`` writes."""

    def number(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and math.isfinite(value))

    if not (
        isinstance(quality, dict)
        and set(quality) == {"difference", "agreement", "exact"}
        and number(quality["difference"])
        and number(quality["agreement"])
        and isinstance(quality["exact"], dict)
        and all(isinstance(name, str) for name in quality["exact"])
        and all(map(number, quality["exact"].values()))
    ):
        raise UserError("the model's config has a malformed int8 entry; save it in int8 again")
