"""Which linear layers are factored: a predicate on the module tree and name patterns, no copied model classes."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from ..errors import UserError


def select_linears(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules inside the encoder's layers, by qualified name, in order.

    A module is inside a layer when its name passes through an index into an ``nn.ModuleList``; embeddings, pooler and
    head never do.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> list(select_linears(model, include=["*.1.*query", "*.1.*key"]))
    ['bert.encoder.layer.1.attention.self.query', 'bert.encoder.layer.1.attention.self.key']

    Args:
        include: patterns (``fnmatch``) of which at least one must match the qualified name; None takes all.
        exclude: patterns of which none may match.

    Raises:
        UserError: nothing is left, or a pattern matches neither a linear layer nor an embedding.
    """
    lists = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    )
    inside = (
        {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and name.startswith(lists)
        }
        if lists
        else {}
    )
    if not inside:
        raise UserError(
            "the model has no linear layers inside an encoder; give a BERT-family encoder that is not factored"
        )
    named = [
        *inside,
        *(name for name, module in model.named_modules() if type(module) is nn.Embedding),
    ]
    for pattern in [*(include or []), *(exclude or [])]:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise UserError(
                f"the pattern {pattern!r} matches no encoder matrix; names look like {next(iter(inside))}"
            )
    chosen = {name: module for name, module in inside.items() if is_chosen(name, include, exclude)}
    if not chosen:
        raise UserError("include and exclude leave no encoder matrix to factor")
    return chosen


def is_chosen(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    """Whether one of ``include`` (if given) and none of ``exclude`` matches a qualified name.

    >>> is_chosen("bert.encoder.layer.1.output.dense", None, ["*.1.*"])
    False
    """
    included = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude or [])
