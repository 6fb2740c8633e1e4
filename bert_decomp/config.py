"""``DecompositionConfig``: which matrices are factored, how, and to what size.

The command line makes its options from these fields and their help texts, so this module imports neither torch nor
transformers: its help must not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import torch

# What is decomposed: single matrices, or what belongs together (see ``units``).
UNITS = ("matrices", "structured", "mixed")
ALLOCATIONS = ("uniform", "waterfill", "sensitivity")
# The share that rank 245 leaves of BERT-base's 72 matrices, the paper's setting.
PAPER_FRACTION = 0.4785
# What sets the size; at most one is given.
SIZES = (
    "rank",
    "encoder_fraction",
    "nested_fractions",
    "model_fraction",
    "flops_fraction",
    "latency_ms",
    "max_drop",
    "plan_file",
)
# Those of them that only running the model, or the user, can turn into ranks.
GOALS = ("latency_ms", "max_drop", "plan_file")
# What only single matrices know.
MATRICES_ONLY = (
    "anchored",
    "rank",
    "min_rank",
    "share_qkv",
    "include",
    "exclude",
)
# Names of version 0.1 and what they are called since 0.2.
RENAMED = {
    "parameters": "encoder_fraction",
    "whole_parameters": "model_fraction",
    "flops": "flops_fraction",
    "latency": "latency_ms",
    "quality": "max_drop",
    "pareto_parameters": "pareto_fractions",
}


def refuse_renamed(names: Iterable[str]) -> None:
    """Raise UserError for the first of ``names`` that is an option's name of version 0.1.

    >>> refuse_renamed(["parameters"])
    Traceback (most recent call last):
    bert_decomp.errors.UserError: parameters is now called encoder_fraction; use that name
    """
    for name in names:
        if name in RENAMED:
            raise UserError(f"{name} is now called {RENAMED[name]}; use that name")


@dataclass
class DecompositionConfig:
    """Which matrices are factored, how, and to what size. Without a size it is the paper's, 0.4785 of the encoder.

    >>> config = DecompositionConfig(encoder_fraction=0.25)
    >>> config.method, config.allocation, config.needs
    ('coupled', 'waterfill', ('gradients',))

    Raises:
        UserError: the method or allocation is unknown, sizes contradict each other, or a number is impossible.
    """

    method: str = field(
        default="coupled",
        metadata={
            "help": "svd (the paper's), asvd, fwsvd, whiten (by what enters a layer), kfac (and what "
            "leaves it) or coupled (both, token by token)."
        },
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "uniform, waterfill (ranks where they buy most) or sensitivity (by trial). Default: "
            "waterfill if the method has gradients and there is no rank, else uniform."
        },
    )
    anchored: bool = field(
        default=False,
        metadata={"help": "Factor each layer on what the compressed ones before it feed it."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "paper: the paper's svd with uniform ranks.",
            "choices": ["paper"],
        },
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "One rank for every matrix."},
    )
    encoder_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the encoder's weights to keep, such as 0.25."},
    )
    nested_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several shares, such as 0.5 0.25 0.125: one model that loads at each of these sizes."
        },
    )
    model_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of all parameters; may cut the word embedding."},
    )
    flops_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the encoder's FLOPs to keep, attention included."},
    )
    flops_seq_length: int = field(
        default=128, metadata={"help": "Length in tokens at which FLOPs are counted."}
    )
    latency_ms: float | None = field(
        default=None,
        metadata={"help": "Milliseconds for one batch, measured on this machine."},
    )
    latency_batch_size: int = field(
        default=8, metadata={"help": "Batch size at which latency_ms is measured."}
    )
    latency_seq_length: int = field(
        default=128, metadata={"help": "Tokens at which latency_ms is measured."}
    )
    latency_engine: str | None = field(
        default=None,
        metadata={
            "help": "What latency_ms is measured in: torch, fused, fused-int8, onnx, onnx-int8, openvino or "
            "openvino-int8. Default: torch, or fused if asked for."
        },
    )
    max_drop: float | None = field(
        default=None,
        metadata={"help": "Points (of 100) that the main metric may fall before training."},
    )
    plan_file: str | None = field(
        default=None,
        metadata={"help": "A plan.json of an earlier run, perhaps edited."},
    )
    embedding_rank: int | None = field(
        default=None,
        metadata={
            "help": "Factor the word embedding to this rank. Default: only where model_fraction says so."
        },
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={"help": "Chosen ranks are multiples of this. Default: 8 on a GPU, else 1."},
    )
    min_rank: int = field(default=4, metadata={"help": "Smallest rank that a budget may give."})
    share_qkv: bool = field(
        default=False,
        metadata={"help": "Give query, key and value one rank."},
    )
    include: list[str] | None = field(
        default=None,
        metadata={"help": "Factor only encoder matrices whose names match a pattern."},
    )
    exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Leave matrices dense whose names match a pattern."},
    )

    # Never None after __post_init__.
    units: str = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "matrices (two factors each), structured (fewer, smaller heads; fewer neurons) or "
            "mixed (both). Default: structured for latency_ms, else matrices.",
            "choices": list(UNITS),
        },
    )
    refit: bool | None = field(
        default=None,
        metadata={
            "help": "Refit each layer to what the compressed ones before it feed it (default: on)."
        },
    )

    def __new__(cls, *_args: Any, **arguments: Any) -> DecompositionConfig:
        refuse_renamed(arguments)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Here and not above, because methods import torch.
        from .methods import METHODS, get_method

        if self.preset not in (None, "paper"):
            raise UserError(f"unknown preset {self.preset!r}; the only one is paper")
        if self.preset == "paper":
            self.method, self.allocation = "svd", "uniform"
        method = get_method(self.method)
        self._check_units()
        if self.anchored and method.anchor is None:
            able = ", ".join(name for name, other in METHODS.items() if other.anchor)
            raise UserError(
                f"anchored has no form for the method {self.method}; leave it out or choose one of {able}"
            )
        if self.allocation is None:
            waterfill_is_free = "gradients" in method.needs and self.rank is None
            self.allocation = "waterfill" if waterfill_is_free else "uniform"
        if self.allocation not in ALLOCATIONS:
            raise UserError(
                f"unknown allocation {self.allocation!r}; choose one of {', '.join(ALLOCATIONS)}"
            )
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} both set the size; give one")
        if self.rank is not None and self.allocation != "uniform":
            raise UserError(
                f"rank is one rank for all matrices, but the allocation {self.allocation} chooses ranks; give "
                "encoder_fraction instead"
            )
        if self.plan_file is not None and self.embedding_rank is not None:
            raise UserError(
                "plan_file holds the embedding's rank as well; edit it there and drop embedding_rank"
            )
        for name in ("encoder_fraction", "model_fraction", "flops_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"{name} is {value}; give a share between 0 and 1")
        self._check_nested()
        for name in ("latency_ms", "max_drop"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; it must be above zero")
        for name in (
            "rank_multiple",
            "min_rank",
            "flops_seq_length",
            "latency_batch_size",
            "latency_seq_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; the smallest is 1")

    def _check_nested(self) -> None:
        if self.nested_fractions is None:
            return
        shares = sorted(set(self.nested_fractions), reverse=True)
        if len(shares) < 2 or not all(0 < share < 1 for share in shares):
            raise UserError(
                f"nested_fractions is {self.nested_fractions}; give two shares or more between 0 and 1, such as "
                "0.5 0.25"
            )
        if self.anchored:
            raise UserError(
                "anchored fits the factors to one size, and nested_fractions are several; drop one"
            )
        if self.units == "mixed":
            raise UserError(
                "nested_fractions goes with units='matrices' or 'structured': of a matrix that has no factors in the "
                "largest size, no smaller one can have some"
            )
        self.nested_fractions = shares

    def _check_units(self) -> None:
        clash = self._clash_with_units()
        if self.units is None:
            # At equal time fewer heads and neurons lose less than factors do, in every engine.
            fastest = self.latency_ms is not None and clash is None
            self.units = "structured" if fastest else "matrices"
        if self.units not in UNITS:
            raise UserError(f"unknown units {self.units!r}; choose one of {', '.join(UNITS)}")
        if self.units == "matrices":
            if self.refit and self.plan_file is None:
                raise UserError(
                    "refit goes with units='structured' or 'mixed'; for matrices use anchored"
                )
        elif clash is not None:
            raise UserError(clash)

    def _clash_with_units(self) -> str | None:
        """What keeps these options from decomposing heads and neurons, in one line, or None."""
        if self.method != "coupled" or self.allocation not in (None, "waterfill"):
            return (
                f"units={self.units!r} weighs by the method coupled and allocates by itself; leave method and "
                "allocation out"
            )
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in MATRICES_ONLY:
            if getattr(self, name) != defaults[name]:
                return f"{name} goes with units='matrices' only; leave it out"
        return None

    def engine_for(self, fused: bool) -> str:
        """The engine that a latency is measured in; ``fused`` says whether the inference form was asked for.

        >>> DecompositionConfig().engine_for(fused=True)
        'fused'
        """
        return self.latency_engine or ("fused" if fused else "torch")

    def multiple_on(self, device: torch.device) -> int:
        """What ranks are multiples of for a model on ``device``: GPUs read factors in vectors of eight."""
        return self.rank_multiple or (8 if device.type == "cuda" else 1)

    def sized(self, encoder_fraction: float) -> DecompositionConfig:
        """The same with another size: that share of the encoder's weights.

        >>> DecompositionConfig(max_drop=1.0).sized(0.5).encoder_fraction
        0.5
        """
        sizes: dict[str, Any] = {**dict.fromkeys(SIZES), "encoder_fraction": encoder_fraction}
        return replace(self, **sizes)

    @property
    def needs(self) -> tuple[str, ...]:
        """What ``collect_statistics`` must collect for this method and allocation."""
        from .methods import get_method

        needs = set(get_method(self.method).needs)
        if self.allocation == "waterfill":
            needs.add("gradients")
        return tuple(sorted(needs))
