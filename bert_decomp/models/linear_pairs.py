"""Factored layers as pairs of ``torch.nn.Linear``, for tools that look for that class: PEFT, torchao, bitsandbytes.

The pair holds the very parameters of the layer that it replaces, so nothing is copied, and its state dict has that
layer's names, so a model saves and loads as before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from lowrank_kernels import LowRankLinear

from ..errors import UserError

Model = TypeVar("Model", bound=nn.Module)
# Of a parameter in the pair -> in the layer that it stands for.
_NAMES = {"down.weight": "down", "up.weight": "up", "up.bias": "bias"}


class LinearPair(nn.Sequential):
    """``up(down(x))`` by two ``nn.Linear`` that share the parameters of ``layer``."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, layer: LowRankLinear):
        down = nn.Linear(layer.in_features, layer.rank, bias=False, device="meta")
        up = nn.Linear(layer.rank, layer.out_features, bias=layer.bias is not None, device="meta")
        down.weight, up.weight, up.bias = layer.down, layer.up, layer.bias
        super().__init__(OrderedDict(down=down, up=up))
        self.train(layer.training)
        self.register_state_dict_post_hook(_rename)
        self.register_load_state_dict_pre_hook(_rename_back)

    @property
    def out_features(self) -> int:
        """Columns of what the pair gives, as any linear layer says it."""
        return self.up.out_features

    def joined(self) -> LowRankLinear:
        """The layer that this pair stands for, with the same parameters.

        Raises:
            UserError: a tool has put something else in the place of one of the two.
        """
        for part in (self.down, self.up):
            # A tool's module, or a tool's tensor in a plain one.
            found = part.weight.data if type(part) is nn.Linear else part
            if type(found) is not Tensor:
                tool = type(found).__module__.partition(".")[0]
                raise UserError(
                    f"a split layer holds a {type(found).__name__} of {tool}, which has no factored form; undo that "
                    "first (PEFT: merge_and_unload)"
                )
        rank, in_features = self.down.weight.shape
        layer = LowRankLinear(
            in_features, len(self.up.weight), rank, self.up.bias is not None, device="meta"
        )
        parameters = dict(self.named_parameters())
        for ours, theirs in _NAMES.items():
            setattr(layer, theirs, parameters.get(ours))
        return layer.train(self.training)


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for ours, theirs in _NAMES.items():
        if prefix + ours in state:
            state[prefix + theirs] = state.pop(prefix + ours)


def _rename_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for ours, theirs in _NAMES.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)


def split_linears_(model: Model) -> Model:
    """Put a pair of ``nn.Linear``, ``down`` and ``up``, in the place of every factored layer; returns the model.

    Outputs, parameters and what the model saves stay the same. ``join_linears_`` puts the factored layers back.

    >>> from lowrank_kernels import LowRankLinear
    >>> split_linears_(nn.Sequential(LowRankLinear(8, 12, 3)))
    Sequential(
      (0): LinearPair(
        (down): Linear(in_features=8, out_features=3, bias=False)
        (up): Linear(in_features=3, out_features=12, bias=True)
      )
    )
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, LinearPair(module))
    return model


def join_linears_(model: Model) -> Model:
    """Undo ``split_linears_``: factored layers with the pairs' parameters; returns the model.

    >>> from lowrank_kernels import LowRankLinear
    >>> join_linears_(split_linears_(nn.Sequential(LowRankLinear(8, 12, 3))))
    Sequential(
      (0): LowRankLinear(in_features=8, out_features=12, rank=3, bias=True, parameters=72)
    )

    Raises:
        UserError: a tool has replaced a part of a pair; the model is as it was.
    """
    pairs = [(name, one) for name, one in model.named_modules() if isinstance(one, LinearPair)]
    layers = [(name, pair.joined()) for name, pair in pairs]
    for name, layer in layers:
        model.set_submodule(name, layer)
    return model
