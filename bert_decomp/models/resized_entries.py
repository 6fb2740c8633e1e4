"""What a saved model's config says of its resized modules: writing it, judging it, rebuilding them from it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..errors import UserError
from .architectures import Family
from .resized import (
    Constant,
    Removed,
    ResizedAttention,
    ResizedLinear,
    attention_name,
    resize_attention_,
)


def describe(module: nn.Module) -> dict[str, Any] | None:
    """What must be known to rebuild a resized module, as plain values; None for any other module.

    >>> describe(ResizedLinear(8, 3))
    {'in_features': 8, 'out_features': 3, 'bias': True}
    """
    if isinstance(module, ResizedAttention):
        return {
            "heads": list(module.heads),
            "score_size": module.score_size,
            "value_size": module.value_size,
        }
    if isinstance(module, ResizedLinear):
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        return {**sizes, "bias": module.bias is not None}
    if isinstance(module, Constant):
        return {"in_features": 0, "out_features": len(module.bias), "bias": True}
    if isinstance(module, Removed):
        return {"in_features": 0, "out_features": 0, "bias": False}
    return None


def is_description(entry: Any) -> bool:
    """Whether ``entry`` has the form of what ``describe`` gives."""
    if not isinstance(entry, dict):
        return False
    # type(), because True is an int, too.
    if set(entry) == {"heads", "score_size", "value_size"}:
        sizes, heads = (entry["score_size"], entry["value_size"]), entry["heads"]
        return (
            isinstance(heads, list)
            and all(type(number) is int for number in (*sizes, *heads))
            and min(sizes) >= 1
            and heads == sorted(set(heads))
        )
    sizes = (entry.get("in_features"), entry.get("out_features"))
    return (
        set(entry) == {"in_features", "out_features", "bias"}
        and all(type(size) is int and size >= 0 for size in sizes)
        and isinstance(entry["bias"], bool)
    )


def rebuild_(
    model: PreTrainedModel, name: str, entry: dict[str, Any], family: Family | None
) -> None:
    """Put a resized module, yet without values, in the place of the architecture's own.

    Args:
        name: of a module of ``model``, dense so far.
        entry: what ``describe`` gave.

    Raises:
        UserError: that module cannot have those sizes.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"the model's config resizes {name}, which it does not have") from error
    if "heads" in entry:
        _rebuild_attention(module, name, entry, family, model.config)
        return
    if type(module) is not nn.Linear:
        raise UserError(
            f"the model's config resizes {name}, not a linear layer of this architecture"
        )
    columns, rows = entry["in_features"], entry["out_features"]
    if columns > module.in_features or rows > module.out_features:
        raise UserError(
            f"the model's config resizes {name} to {columns}x{rows}, more than its "
            f"{module.in_features}x{module.out_features}"
        )
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    if not rows:
        smaller: nn.Module = Removed()
    elif not columns:
        smaller = Constant(rows, **place)
    else:
        smaller = ResizedLinear(columns, rows, bias=entry["bias"], **place)
    model.set_submodule(name, smaller)


def _rebuild_attention(
    module: nn.Module, name: str, entry: dict[str, Any], family: Family | None, config: Any
) -> None:
    if family is None or family.query == family.key or not name.endswith(attention_name(family)):
        raise UserError(f"the model's config resizes {name}, not attention of this architecture")
    size = config.hidden_size // config.num_attention_heads
    heads = tuple(entry["heads"])
    if not set(heads) <= set(range(config.num_attention_heads)) or size < max(
        entry["score_size"], entry["value_size"]
    ):
        raise UserError(
            f"the model's config gives {name} heads beyond the {config.num_attention_heads} of {size} that "
            "the architecture has"
        )
    resize_attention_(module, family, heads, entry["score_size"], entry["value_size"])


def check_resized(model: nn.Module) -> None:
    """Raise UserError where the sizes of attention and of its linear layers contradict each other."""
    for name, module in model.named_modules():
        if not isinstance(module, ResizedAttention) or not module.heads:
            continue
        for part, size in (
            ("query", module.score_size),
            ("key", module.score_size),
            ("value", module.value_size),
        ):
            linear, wanted = getattr(module, module.parts[part]), len(module.heads) * size
            if getattr(linear, "out_features", None) != wanted:
                raise UserError(
                    f"the model's config gives {name}.{module.parts[part]} another size than its "
                    f"{len(module.heads)} heads of {size}"
                )
