"""Latency, throughput and memory of several forms of one model, in one process and on the same inputs.

The models take turns call by call, so that a machine whose speed drifts treats all of them alike; ratios between them
are therefore steadier than the times themselves.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_kernels import LowRankLinear
from lowrank_kernels.env import cpu_name

from ..errors import UserError
from ..models.architectures import longest_input
from .profiling import time_split


@contextmanager
def backend_of(model: nn.Module, backend: str | None) -> Iterator[nn.Module]:
    """Let every factored layer of ``model`` use one backend (None: the dispatcher's choice), and put back what was."""
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    before = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = backend
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.backend = old


def random_inputs(
    model: PreTrainedModel, batch_size: int, length: int, seed: int = 0
) -> dict[str, Tensor]:
    """Token ids without padding, (batch_size, length), on the model's device.

    Raises:
        UserError: the model takes no input of that length.
    """
    limit = longest_input(model)
    if limit is not None and length > limit:
        raise UserError(f"cannot measure at {length} tokens: the model takes {limit} at most")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (batch_size, length), generator=generator)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    cuda: bool = False,
    least: int = 5,
    warm: int = 2,
    within: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds of each call, the device's work included, one call of each in turn until ``seconds`` apiece are spent.

    Args:
        calls: by name.
        seconds: for each of them.
        least: calls of each at least.
        warm: calls of each before any is timed.
        within: gives the context in which the call of that name runs; entering it is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def once(name: str) -> float:
        with within(name):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

    for name in calls:
        for _ in range(warm):
            once(name)
    start = time.perf_counter()
    while (
        time.perf_counter() - start < seconds * len(calls) or len(times[next(iter(calls))]) < least
    ):
        for name in calls:
            times[name].append(once(name))
    return times


def median_ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios of what two calls took that had turns next to each other (see ``take_turns``)."""
    return float(np.median(np.divide(times, others)))


def peak_memory(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Most bytes that one forward pass holds at once beyond weights and inputs, scratch space inside
    an operator apart (on a GPU it counts too, by the allocator's own account)."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with HeldBytes() as held:
        model(**inputs)
    return held.peak


class HeldBytes(TorchDispatchMode):
    """Follows the bytes of every tensor that operators return, from its making to its last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs = {
            tensor.untyped_storage().data_ptr()
            for tensor in pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().data_ptr() not in inputs | self._known
            ):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.held)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self.held += size
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size


@torch.inference_mode()
def measure(
    forms: dict[str, tuple[nn.Module, str | None]],
    batch_sizes: list[int],
    length: int,
    *,
    seconds: float = 2.0,
    threads: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Time every form at every batch size.

    Args:
        forms: by name (model in evaluation mode, backend of its factored layers); the first is the one others are
            compared with.
        batch_sizes: sentences a batch.
        length: tokens a sentence.
        seconds: time spent on each form and batch size (at least 5 calls).
        threads: CPU threads; the setting before is put back.

    Returns:
        A plain dict: the conditions, and one row a form and batch size with ``latency_ms`` (median), its 0.2 and 0.8
        quantiles, ``sentences_per_second``, ``speedup`` over the first form, ``peak_activation_mb`` and ``weights_mb``;
        and ``time_split``, each form's shares by part (see ``time_split``) at the largest batch size.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for batch_size in tqdm(
            batch_sizes, desc="measure", unit="batch size", disable=not progress, leave=False
        ):
            inputs = {
                name: random_inputs(model, batch_size, length) for name, (model, _) in forms.items()
            }
            calls = {name: partial(model, **inputs[name]) for name, (model, _) in forms.items()}
            times = take_turns(
                calls,
                seconds,
                cuda=next(iter(inputs.values()))["input_ids"].is_cuda,
                within=lambda name: backend_of(*forms[name]),
            )
            first = np.median(times[next(iter(forms))])
            for name, (model, backend) in forms.items():
                low, median, high = np.quantile(times[name], (0.2, 0.5, 0.8))
                with backend_of(model, backend):
                    peak = peak_memory(model, inputs[name])
                rows.append(
                    {
                        "form": name,
                        "batch_size": batch_size,
                        "latency_ms": median * 1e3,
                        "latency_ms_q20": low * 1e3,
                        "latency_ms_q80": high * 1e3,
                        "calls": len(times[name]),
                        "sentences_per_second": batch_size / median,
                        "speedup": first / median,
                        "peak_activation_mb": peak / 1e6,
                        "weights_mb": sum(
                            tensor.numel() * tensor.element_size()
                            for tensor in (*model.parameters(), *model.buffers())
                        )
                        / 1e6,
                    }
                )
        largest = max(batch_sizes)
        splits = {}
        for name, (model, backend) in forms.items():
            with backend_of(model, backend):
                splits[name] = time_split(model, random_inputs(model, largest, length))
    finally:
        torch.set_num_threads(before)
    device = next(next(iter(forms.values()))[0].parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": threads,
        "length": length,
        "rows": rows,
        "time_split": splits,
    }
