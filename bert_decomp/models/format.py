"""What a folder's config says of the modules that are not their architecture's own: ``LowRankConfig``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_kernels import LowRankLinear

from ..errors import UserError
from .embedding import LowRankEmbedding
from .int8 import QUANTISED, check_quality, is_entry
from .linear_pairs import LinearPair
from .nested import Nested, NestedLinear, ranks_of
from .nested_resized import attention_sizes, describe_attention, resized_sizes
from .replacement import Replacement
from .resized import RESIZED, ResizedAttention
from .resized_entries import describe, is_description

# Version 1 had no placeholder, version 2 no int8, version 3 one size only. Each folder has the lowest that can say what
# it holds.
INT8_VERSION, FORMAT_VERSION = 3, 4
FACTORED = (LowRankLinear, LowRankEmbedding, NestedLinear)


@register_quantization_config("low_rank")
class LowRankConfig(QuantizationConfigMixin):
    """What must be known to rebuild the factored modules before their weights are read.

    >>> LowRankConfig({"encoder.layer.0.output.dense": {"rank": 8, "bias": True}}).to_dict()["quant_method"]
    'low_rank'

    Args:
        modules: for each factored module's qualified name ``{"rank": int, "bias": bool}``. The bias is part of the
            plan because a centred method adds one to a layer that had none. A factored word embedding always has one.
            A resized module has its sizes (see ``resized``), and a factored one among them ``in_features`` and
            ``out_features`` besides. One in 8 bits has what ``int8.QuantisedLinear.describe`` gives, a
            nested one its ranks by encoder fraction.
        version: of the format that the folder has.
        int8: what 8 bits changed on the calibration batches, the fields of ``runtime.int8.Quality``; None for a model
            in floating point. A model with it is fused as soon as it is loaded.

    Raises:
        UserError: the format is of a later version, or an entry is malformed.
    """

    # Of the class, so that the config of a model in floating point does not mention it.
    int8: dict[str, Any] | None = None

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        int8: dict[str, Any] | None = None,
        **ignored: Any,
    ):
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UserError(
                f"low-rank format version {version!r} is not one of 1 to {FORMAT_VERSION}; "
                "load the model with the bert_decomp that wrote it"
            )
        self.quant_method = "low_rank"
        self.version = 2 if int8 is None else INT8_VERSION
        if int8 is not None:
            check_quality(int8)
            self.int8 = int8
        self.modules = {} if modules is None else modules
        if not isinstance(self.modules, dict):
            raise UserError("the model's config has low-rank modules that are not a table of names")
        fractions = self.fractions
        if fractions:
            self.version = FORMAT_VERSION
        for name, entry in self.modules.items():
            if is_description(entry) or (int8 is not None and is_entry(entry)):
                continue
            if fractions and _fractions(entry) == fractions:
                continue
            # type(), because True is an int, too.
            if not (
                isinstance(entry, dict)
                and type(entry.get("rank")) is int
                and entry["rank"] >= 1
                and isinstance(entry.get("bias"), bool)
                and all(
                    type(entry.get(size, 1)) is int and entry.get(size, 1) >= 1
                    for size in ("in_features", "out_features")
                )
            ):
                raise UserError(
                    f"the model's config has a malformed low-rank entry for {name}: {entry!r}"
                )

    @property
    def fractions(self) -> tuple[float, ...]:
        """The encoder fractions of a nested model, falling; none of a plain one."""
        nested = (_fractions(entry) for entry in self.modules.values())
        return next((fractions for fractions in nested if fractions), ())

    @classmethod
    def of(cls, model: nn.Module) -> LowRankConfig:
        """Describe the factored, resized and quantised modules that a file of ``model`` has; see ``saved_modules``."""
        modules = saved_modules(model)
        # Only beside resized modules may a factored one have other sizes than its architecture says.
        resized = any(isinstance(module, (*RESIZED, *QUANTISED)) for module in modules.values())
        entries: dict[str, dict[str, Any]] = {}
        for name, module in modules.items():
            if isinstance(module, Nested):
                entries[name] = module.describe()
            elif isinstance(module, ResizedAttention) and module.nested:
                entries[name] = describe_attention(module)
            elif isinstance(module, FACTORED):
                entries[name] = {"rank": module.rank, "bias": module.bias is not None}
                if resized and isinstance(module, LowRankLinear):
                    entries[name]["in_features"] = module.in_features
                    entries[name]["out_features"] = module.out_features
            elif isinstance(module, QUANTISED):
                entries[name] = module.describe()
            elif (entry := describe(module)) is not None:
                entries[name] = entry
        return cls(entries, int8=_quality(model))


def _fractions(entry: Any) -> tuple[float, ...]:
    """Of an entry of a nested model; none of any other."""
    for sizes in (ranks_of(entry), resized_sizes(entry), attention_sizes(entry)):
        if sizes is not None:
            return tuple(sizes)
    return ()


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` as files have them: what inference forms and pairs stand for, or store."""
    modules: dict[str, nn.Module] = {}
    replaced: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(replaced):
            continue
        if isinstance(module, Replacement):
            replaced += (f"{name}.",)
            modules.update(module.source.named_modules(prefix=name))
            modules.update(stored_by(name, module))
        elif isinstance(module, LinearPair):
            replaced += (f"{name}.",)
            modules[name] = module.joined()
        else:
            modules[name] = module
    return modules


def refuse_fused(model: nn.Module, what: str) -> None:
    """Raise UserError if ``model`` is an inference form, or the skeleton of one, which cannot be ``what``."""
    forms = [module for module in model.modules() if isinstance(module, Replacement)]
    skeleton = not forms and any(isinstance(module, QUANTISED) for module in model.modules())
    if skeleton or any(form.from_file for form in forms):
        raise UserError(
            f"the model was saved in int8 and cannot be {what}; take the folder that it was made of"
        )
    if forms:
        raise UserError(f"a fused model cannot be {what}; unfuse_ it first")


def stored_by(name: str, form: Replacement) -> dict[str, nn.Module]:
    """What an inference form called ``name`` stores, by qualified name."""
    return {f"{name}.{inner}".rstrip("."): module for inner, module in form.stored().items()}


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with what inference forms store in the place of what they stand for."""
    state = dict(model.state_dict())
    for name, form in model.named_modules():
        if not isinstance(form, Replacement):
            continue
        stored = stored_by(name, form)
        gone = tuple(f"{inner}." for inner in stored)
        state = {key: value for key, value in state.items() if not key.startswith(gone)}
        for inner, module in stored.items():
            state.update(module.state_dict(prefix=f"{inner}."))
    return state


def _quality(model: nn.Module) -> dict[str, Any] | None:
    """What int8 changes, in a fused model of which it changes something. JSON has no infinity."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    for form in model.modules():
        if isinstance(form, Replacement) and form.quality is not None:
            found = asdict(form.quality)
            exact = {name: number(error) for name, error in found.pop("exact").items()}
            return {**{name: number(value) for name, value in found.items()}, "exact": exact}
    return None
