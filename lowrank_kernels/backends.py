"""The registry of backends: which of them can run the operators, where, and if not, why not.

A backend is data: a name, a test of the device, a test of the problem, and a loader of its operator functions. A new
backend is one ``Backend`` and one call of ``register_backend``; nothing else in the package knows it by name. Operators
are loaded on first use, so that importing the package imports no compiler and touches no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .problem import Problem

# The backend that serves every problem everywhere: two library matmuls.
FALLBACK = "torch"

Options = Mapping[str, Any]


def accept_no_options(options: Options) -> dict[str, Any]:
    """``parse_options`` of a backend that has none.

    Raises:
        ValueError: there are options.
    """
    if options:
        raise ValueError(f"it takes no options and has {', '.join(map(str, options))[:100]}")
    return {}


def _only_the_default(problem: Problem, device: torch.device) -> Iterable[Options]:
    return ({},)


@dataclass(frozen=True)
class Backend:
    """What the dispatcher and the tuner need to know of a backend.

    Attributes:
        name: as users write it in ``backend=``.
        why_not_on: device -> None if the backend can run there, else the reason in one clause.
        why_not_for: problem, device -> None if the backend serves it there, else the reason in one clause.
        load: returns the operator functions by name: ``linear``, ``qkv``, ``ffn``, ``linear_norm``, ``norm``,
            ``attention``; those it lacks are served by ``torch``. Each takes 2-D inputs, the arguments of the function
            of that name that ``torch`` registers, and the keywords that ``parse_options`` returns.
        parse_options: validates the options of a table's entry, which are JSON, and returns them as keyword arguments
            of the operator functions; raises ValueError or TypeError for any that it does not know.
        candidates: problem, device -> the options (as JSON) that the tuner times.
        likely: problem, device -> the few of them that calibration times; None for all.
        compile_ahead: a context in which calls compile what they need, several at a time, and compute nothing; None if
            there is nothing to compile.
        prepare: returns, by operator, makers of functions for fixed factors: ``maker(*factors)(x, *rest, **keywords)``
            computes what the operator function does and may do once what depends on the factors alone. ``rest`` is the
            residual of ``linear_norm`` and ``norm``, all but query and heads of ``attention``, and nothing elsewhere.
            None if there is nothing to prepare.
        prepared_only: whether its measured times hold for prepared factors alone, so that no table may choose it for a
            call of a public operator, which would prepare them again.
        checked_on: where its results have been held to float64; shown by ``python -m lowrank_kernels.env``. Empty where
            no kernel of it has run.

    >>> from lowrank_kernels.reference.linear import linear
    >>> def on_a_cpu(device):
    ...     return None if device.type == "cpu" else "it runs on a CPU alone"
    >>> plain = Backend("plain", on_a_cpu, lambda problem, device: None, lambda: {"linear": linear})
    >>> plain.why_not_on(torch.device("meta"))
    'it runs on a CPU alone'
    """

    name: str
    why_not_on: Callable[[torch.device], str | None]
    why_not_for: Callable[[Problem, torch.device], str | None]
    load: Callable[[], Mapping[str, Callable[..., Any]]]
    parse_options: Callable[[Options], dict[str, Any]] = accept_no_options
    candidates: Callable[[Problem, torch.device], Iterable[Options]] = _only_the_default
    likely: Callable[[Problem, torch.device], Iterable[Options]] | None = None
    compile_ahead: Callable[[], AbstractContextManager[Any]] | None = None
    prepare: Callable[[], Mapping[str, Callable[..., Any]]] | None = None
    prepared_only: bool = False
    checked_on: str = ""


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name.

    >>> register_backend(get_backend("torch"))  # the same once more
    >>> "torch" in backend_names()
    True
    """
    _backends[backend.name] = backend
    operators.cache_clear()


def backend_names() -> tuple[str, ...]:
    """The names that ``backend=`` accepts, beside "auto".

    >>> backend_names()
    ('torch', 'dense', ...)
    """
    return tuple(_backends)


def get_backend(name: str) -> Backend:
    """Look a backend up.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in _backends:
        raise ValueError(
            f"backend is {name!r}; it must be None, 'auto' or one of {', '.join(_backends)}"
        )
    return _backends[name]


@cache
def operators(name: str) -> Mapping[str, Callable[..., Any]]:
    """The operator functions of a backend, loaded once."""
    return get_backend(name).load()


def has_operator(name: str, operator: str, prepared: bool = False) -> bool:
    """Whether a backend has an operator, for calls or for factors that are prepared."""
    prepare = get_backend(name).prepare
    if prepared and prepare is not None and operator in prepare():
        return True
    return operator in operators(name)


def why_not(
    name: str, problem: Problem, device: torch.device, prepared: bool = False
) -> str | None:
    """Why a backend cannot serve a problem on a device, in one clause, or None if it can."""
    backend = get_backend(name)
    reason = backend.why_not_on(device)
    if reason is None and not has_operator(name, problem.operator, prepared):
        reason = f"it has no {problem.operator}"
    return backend.why_not_for(problem, device) if reason is None else reason


def bind(name: str, operator: str, factors: tuple) -> Callable[..., tuple]:
    """An operator function of a backend with its factors in place: ``bind(...)(x, *rest, **keywords)``.

    ``factors`` are the operator function's arguments but x and what has a row for every row of x; that is ``rest``, the
    residual of ``linear_norm`` and ``norm``.
    """
    prepare = get_backend(name).prepare
    if prepare is not None:
        return prepare()[operator](*factors)
    function = operators(name)[operator]
    if operator == "linear_norm":
        down, up, bias, *norm = factors
        return lambda x, residual, **keywords: function(
            x, down, up, bias, residual, *norm, **keywords
        )
    return lambda x, *rest, **keywords: function(x, *rest, *factors, **keywords)
