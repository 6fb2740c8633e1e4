"""Operators on fixed factors, for the inference form of a model: a call costs the host only the input's part.

A call of the public operators checks its arguments, asks the dispatcher and goes through torch's operator registry,
which together take the host longer than a small kernel runs. The ``prepare_`` functions (``linear``, ``qkv``, ``ffn``,
``norm``, ``attention``) check the factors once and return a ``Prepared``: a call of it on rows x either computes the
operator, or returns None where library calls are the better choice, so that the caller does those its own way.

    >>> import torch
    >>> layer = prepare_linear(torch.ones(2, 4), torch.ones(3, 2), torch.zeros(3))
    >>> layer(torch.ones(5, 4)) is None        # no fused kernel on a CPU
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import activations, checks, dispatch
from .backends import FALLBACK, bind, get_backend
from .operators.ffn import lowrank_ffn
from .operators.linear import lowrank_linear
from .operators.qkv import lowrank_qkv
from .problem import Problem
from .reference.attention import attention as reference_attention
from .reference.norm import norm as reference_norm

# Numbers of rows whose choice is kept; packed batches have a new one at every call.
ROWS_LIMIT = 4096


class Prepared:
    """One operator with its factors, made by the ``prepare_`` functions.

    The factors may change in place; where a module replaces them, it prepares again. A copy of a module must do so too:
    ``copy.deepcopy`` and ``pickle`` turn a ``Prepared`` into None.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        factors: tuple,
        public: Callable[..., Any],
        named: bool = True,
    ) -> None:
        self._problem, self._device, self._dtype = problem, device, problem.dtype
        self._factors, self._public = factors, public
        # Whether a profiler knows the public form by its name.
        self._named = named
        self._calls: dict[tuple[int, bool], Callable[..., Any] | None] = {}
        self._generation = -1
        # Made for a backend once: plans by backend.
        self._plans: dict[str, Callable[..., Any]] = {}
        # A CUDA graph reads a plan's tensors by address: what one may hold lives on when the choice is made again.
        self._recorded: list[Callable[..., Any]] = []

    @property
    def problem(self) -> Problem:
        """What it computes, at 0 rows."""
        return self._problem

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        """The operator on x (rows, in) and what is not a factor, or None where two library matmuls are the choice."""
        if not self._is_plain(x):
            return None if dispatch.route(x, None) == FALLBACK else self._public(x, *rest)
        self._renew()
        key = (x.shape[0], dispatch.capturing(self._device))
        if key not in self._calls:
            self._calls[key] = self._choose(*key)
        call = self._calls[key]
        if call is None:
            return None
        with dispatch.current(self._device):
            result = call(x, *rest)[0]
        return result

    def ready(self, rows: Iterable[int]) -> None:
        """Choose for some numbers of rows now, and prepare what is chosen: merged factors are made, for example."""
        self._renew()
        for count in rows:
            for captured in (False, True):
                self._calls[count, captured] = self._choose(count, captured)

    def _renew(self) -> None:
        if self._generation != dispatch.generation:
            self._calls, self._plans, self._generation = {}, {}, dispatch.generation

    def _is_plain(self, x: Tensor) -> bool:
        """Whether x may go to a kernel directly: eager, without gradients, autocast or a profiler at work."""
        return (
            not torch.compiler.is_compiling()
            and x.dtype is self._dtype
            and x.device == self._device
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled(self._device.type)
            and not (self._named and torch.autograd.profiler._is_profiler_enabled)
        )

    def _choose(self, rows: int, captured: bool) -> Callable[..., Any] | None:
        if len(self._calls) >= ROWS_LIMIT:
            self._calls.clear()
        problem = self._problem._replace(rows=rows)
        name, options = dispatch.choose(dispatch.override(), problem, self._device, captured, True)
        if name == FALLBACK:
            return None
        if name not in self._plans:
            if get_backend(name).prepared_only and dispatch.in_capture(self._device):
                # Factors merged in a capture would not be there before its first replay.
                return None
            self._plans[name] = bind(name, problem.operator, self._factors)
        plan = self._plans[name]
        if captured and plan not in self._recorded:
            self._recorded.append(plan)
        return (lambda x, *rest: plan(x, *rest, **options)) if options else plan

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def prepare_linear(
    down: Tensor, up: Tensor, bias: Tensor | None, activation: str | None = None
) -> Prepared:
    """``lowrank_linear`` with factors down (rank, in), up (out, rank), bias (out) or None.

    Raises:
        ValueError, TypeError: as ``lowrank_linear`` does.
    """
    checks.factors(down[:0], down, up, bias)
    activation = activations.canonical(activation)
    outer, rank = up.shape
    problem = Problem("linear", 0, down.shape[1], outer, rank, down.dtype)
    return Prepared(
        problem,
        down.device,
        (down, up, bias, activation),
        lambda x: lowrank_linear(x, down, up, bias, activation),
    )


def prepare_qkv(
    downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Prepared:
    """``lowrank_qkv`` with three of each factor: down (rank, in), up (out, rank), bias (out) or None.

    Raises:
        ValueError, TypeError: as ``lowrank_qkv`` does.
    """
    downs, ups, biases = tuple(downs), tuple(ups), tuple(biases)
    for index in range(3):
        checks.factors(downs[0][:0], downs[index], ups[index], biases[index], f"[{index}]")
    outer, rank = max(up.shape[0] for up in ups), max(up.shape[1] for up in ups)
    problem = Problem("qkv", 0, downs[0].shape[1], outer, rank, downs[0].dtype)
    return Prepared(
        problem,
        downs[0].device,
        (downs, ups, biases),
        lambda x: lowrank_qkv(x, downs, ups, biases),
    )


def prepare_ffn(
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str | None = "gelu",
) -> Prepared:
    """``lowrank_ffn`` with its two factor pairs.

    Raises:
        ValueError, TypeError: as ``lowrank_ffn`` does.
    """
    checks.factors(down1[:0], down1, up1, bias1, "1")
    checks.second_pair(down1[:0], up1, down2, up2, bias2)
    activation = activations.canonical(activation)
    rank = max(down1.shape[0], down2.shape[0])
    problem = Problem("ffn", 0, down1.shape[1], len(up2), rank, down1.dtype, len(up1))
    factors = (down1, up1, bias1, down2, up2, bias2, activation)
    return Prepared(problem, down1.device, factors, lambda x: lowrank_ffn(x, *factors))


def prepare_norm(weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Prepared:
    """LayerNorm(x + residual) with its weight and bias (width); a call takes x and residual, both (rows, width).

    >>> import torch
    >>> norm = prepare_norm(torch.ones(4), torch.zeros(4))
    >>> norm(torch.ones(2, 4), torch.ones(2, 4)) is None    # no fused kernel on a CPU
    True

    Raises:
        ValueError, TypeError: weight and bias do not go together.
    """
    checks.norm(weight, weight, weight, bias)
    width = weight.shape[0]
    problem = Problem("norm", 0, width, width, 0, weight.dtype)
    return Prepared(
        problem,
        weight.device,
        (weight, bias, eps),
        lambda x, residual: reference_norm(x, residual, weight, bias, eps)[0],
        named=False,
    )


def prepare_attention(
    heads: int, score_size: int, value_size: int, dtype: torch.dtype, device: torch.device
) -> Prepared:
    """Attention within sentences, heads apart, by heads with those sizes.

    A call takes query and key (rows, heads * score size), value (rows, heads * value size), where the queries and keys
    of each sentence begin, both (sentences + 1,) in int32, and the most of each that a sentence has.

    >>> import torch
    >>> attention = prepare_attention(2, 8, 16, torch.float32, torch.device("cpu"))
    >>> q, k, v = torch.ones(5, 16), torch.ones(5, 16), torch.ones(5, 32)
    >>> bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> attention(q, k, v, bounds, bounds, 3, 3) is None    # no fused kernel on a CPU
    True
    """
    inner, outer = heads * score_size, heads * value_size
    problem = Problem("attention", 0, inner, outer, 0, dtype, heads)
    return Prepared(
        problem,
        device,
        (heads,),
        lambda q, k, v, asking, bounds, most_asking, longest: reference_attention(
            q, k, v, asking, bounds, most_asking, longest, heads
        )[0],
        named=False,
    )
