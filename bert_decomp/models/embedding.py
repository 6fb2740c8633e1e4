"""The word embedding of a model, and its factored form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRankEmbedding(nn.Module):
    """y = codes[ids] up^T + bias: ids (...) integers -> (..., embedding_dim).

    ``codes`` (num_embeddings, rank), ``up`` (embedding_dim, rank), ``bias`` (embedding_dim,), all of one dtype. No
    gradient reaches the codes of ``padding_idx``.

    >>> embedding = LowRankEmbedding(num_embeddings=100, embedding_dim=12, rank=3)
    >>> embedding(torch.tensor([[1, 2, 99]])).shape
    torch.Size([1, 3, 12])

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (
            ("num_embeddings", num_embeddings),
            ("embedding_dim", embedding_dim),
            ("rank", rank),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rank = rank
        self.padding_idx = padding_idx
        self.codes = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance 1 that nn.Embedding starts with."""
        nn.init.normal_(self.codes, std=self.rank**-0.25)
        nn.init.normal_(self.up, std=self.rank**-0.25)
        nn.init.zeros_(self.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.codes, self.padding_idx), self.up, self.bias)

    def extra_repr(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, padding_idx={self.padding_idx}, "
            f"parameters={parameters}"
        )


def word_embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """Qualified name and module of the dense word embedding.

    Raises:
        UserError: the model has none, or an output of the model shares its weight.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    if type(embedding) is not nn.Embedding:
        raise UserError(
            f"{type(model).__name__} has no dense word embedding to factor; drop embedding_rank"
        )
    for name, module in model.named_modules():
        if module is not embedding and getattr(module, "weight", None) is embedding.weight:
            raise UserError(
                f"{name} of {type(model).__name__} shares the word embedding's weight, so it cannot be factored; drop "
                "embedding_rank"
            )
    return next(name for name, module in model.named_modules() if module is embedding), embedding
