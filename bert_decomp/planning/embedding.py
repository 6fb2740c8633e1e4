"""The word embedding's place in a plan: a table of tokens by width, cut to a rank or left dense."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from ..errors import UserError
from ..models.embedding import word_embedding
from .plan import MatrixPlan, RankPlan


def embedding_plan(model: PreTrainedModel, rank: int | None) -> dict[str, MatrixPlan]:
    """The word embedding cut to ``rank``, by its qualified name; nothing if ``rank`` is None.

    Raises:
        UserError: there is no word embedding, or the rank is below 1 or reaches break-even.
    """
    if rank is None:
        return {}
    name, embedding = word_embedding(model)
    entry = MatrixPlan(embedding.num_embeddings, embedding.embedding_dim, rank)
    largest = math.ceil(entry.break_even_rank) - 1
    if not 1 <= rank <= largest:
        raise UserError(
            f"embedding_rank {rank} does not compress the word embedding of {embedding.num_embeddings}x"
            f"{embedding.embedding_dim}; give 1 to {largest}"
        )
    return {name: entry}


def parameters_saved(embeddings: dict[str, MatrixPlan]) -> int:
    """Parameters that factored embeddings save, their means counted."""
    return sum(
        entry.in_features * entry.out_features - entry.weights - entry.out_features
        for entry in embeddings.values()
    )


def check_embeddings(model: PreTrainedModel, plan: RankPlan) -> None:
    """Raise UserError unless what ``plan`` says of embeddings is of the dense word embedding of ``model``."""
    for name, entry in plan.embeddings.items():
        own_name, embedding = word_embedding(model)
        shape = entry.in_features, entry.out_features
        if name != own_name or tuple(embedding.weight.shape) != shape:
            raise UserError(
                f"the plan's {name} ({entry.in_features}x{entry.out_features}) is not the word embedding of this "
                "model; make the plan again"
            )
        if entry.rank is not None and entry.rank > min(shape):
            raise UserError(f"the plan gives {name} rank {entry.rank}; full rank is {min(shape)}")
