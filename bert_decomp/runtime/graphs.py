"""Forward passes replayed from CUDA graphs, one for each bucket of shapes: at small batches the host's time is all.

A graph is a recording of launches for one shape. So a batch is copied into the buffers of the smallest bucket that
holds it, padded with masked tokens, the graph is replayed, and the padding is cut off the results. Whatever no bucket
fits, or what a recording cannot do, runs as without graphs. Graphs are captured when the form is made, never in
mid-traffic. Sentences must start their rows and have no gap: then padding attends to padding, and no mask is needed.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lowrank_kernels import dispatch

from ..errors import UserError
from ..models.architectures import longest_input
from .calls import INPUTS
from .encoder import FusedEncoder
from .sequences import is_prefix

Bucket = tuple[int, int]
# What "auto" stands for.
AUTOMATIC: tuple[Bucket, ...] = ((1, 32), (1, 128), (8, 32), (8, 128), (32, 32), (32, 128))
# A bucket of up to so many tokens takes any batch that fits; a larger one must be filled to the share.
FEW_TOKENS = 1024
LEAST_FILLED = 0.25


def _is_bucket(pair: Any) -> bool:
    whole = isinstance(pair, (tuple, list)) and all(type(n) is int and n > 0 for n in pair)
    return whole and len(pair) == 2


def check_buckets(model: PreTrainedModel, graphs: Sequence[Bucket] | str) -> list[Bucket]:
    """The buckets (batch, length) asked for, in order of their size.

    Raises:
        UserError: they are none, the model is not on a GPU, or takes no input of that length.
    """
    longest = longest_input(model)
    if graphs == "auto":
        buckets = [pair for pair in AUTOMATIC if longest is None or pair[1] <= longest]
    else:
        if isinstance(graphs, str) or not all(map(_is_bucket, graphs)):
            raise UserError(f"graphs is {graphs!r}; it must be 'auto' or pairs (batch, length)")
        buckets = [(batch, length) for batch, length in graphs]
        if longest is not None and any(length > longest for _, length in buckets):
            raise UserError(f"the model takes {longest} tokens; no graph can be for more")
    if model.device.type != "cuda":
        raise UserError(f"CUDA graphs need a GPU, and the model is on {model.device.type}")
    return sorted(set(buckets), key=lambda bucket: (bucket[0] * bucket[1], bucket))


class CudaRecorder:
    """Records calls as CUDA graphs that share their memory, and keeps their replays in order across streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._done, self._asked = torch.cuda.Event(), torch.cuda.Event()
        self._answer = torch.empty((), dtype=torch.bool, pin_memory=True)

    def record(self, call: Callable[[], ModelOutput]) -> Callable[[], ModelOutput]:
        """A function that does again what ``call`` did, on the same tensors, and returns the same tensors."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # What will be captured is compiled and loaded before: in a capture it cannot be.
            with torch.cuda.stream(stream), dispatch.as_captured():
                for _ in range(2):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                output = call()

        def replay() -> ModelOutput:
            graph.replay()
            return output

        return replay

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """Work inside the block waits for that of the blocks before, whatever streams they were on."""
        with torch.cuda.device(self._device):
            self._done.wait()
            yield
            self._done.record()

    def ask(self, flag: Tensor) -> Callable[[], bool]:
        """A function that waits for one boolean on the GPU, but for nothing that is launched after this call. Only
        inside ``in_order``, and before the next call."""
        self._answer.copy_(flag, non_blocking=True)
        self._asked.record()

        def answer() -> bool:
            self._asked.synchronize()
            return bool(self._answer)

        return answer


class Buffers:
    """The tensors that a bucket's graph reads, which are views of one; masked tokens until they are filled."""

    def __init__(self, bucket: Bucket, names: Sequence[str], padding: int, device: torch.device):
        self.bucket, self.names = bucket, tuple(names)
        blank = torch.zeros((len(names), *bucket), dtype=torch.long, device=device)
        for name, part in zip(names, blank, strict=True):
            if name == "input_ids":
                part.fill_(padding)
            elif name == "attention_mask":
                # Attention over nothing is NaN.
                part[:, 0] = 1
        self._blank, self._held = blank, blank.clone()
        self.inputs = dict(zip(names, self._held, strict=True))

    def fill(self, given: dict[str, Any], rows: int, length: int) -> None:
        """Copy a call's tensors (rows, length), masked tokens around them; few launches, which the GPU waits for."""
        values = [(name, given[name]) for name in self.names if given.get(name) is not None]
        if (rows, length) != self.bucket or len(values) < len(self.names):
            self._held.copy_(self._blank)
        if given.get("attention_mask") is None and "attention_mask" in self.inputs:
            self.inputs["attention_mask"][:rows, :length] = 1
        if values and [name for name, _ in values] == list(self.names[: len(values)]):
            stacked = torch.stack([value.long() for _, value in values])
            self._held[: len(values), :rows, :length].copy_(stacked)
            return
        for name, value in values:
            self.inputs[name][:rows, :length].copy_(value)


class Graph(NamedTuple):
    """What was recorded for a bucket: what it reads, and how it is done again."""

    buffers: Buffers
    replay: Callable[[], ModelOutput]


class GraphedForward:
    """Takes the place of a model's ``forward``."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: FusedEncoder,
        buckets: Sequence[Bucket],
        recorder: CudaRecorder,
    ) -> None:
        self._encoder, self._device = encoder, model.device
        # None in a copy.
        self._recorder: CudaRecorder | None = recorder
        before = vars(model).get("forward")
        self._eager = partial(type(model).forward, model) if before is None else before
        known = inspect.signature(type(model).forward).parameters
        self._names = [name for name in INPUTS if name in known]
        self._padding = model.config.pad_token_id or 0
        self._lock = threading.Lock()
        self._graphs: dict[Bucket, Graph] = {}
        self._version = encoder.version
        with torch.inference_mode(False), torch.no_grad(), self._padded():
            self._lengths = self._length_dimensions()
            # The largest first: the others find room in its memory.
            for bucket in reversed(buckets):
                self._graphs[bucket] = self._record(bucket, recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names[:1], args, strict=False)) | kwargs
        bucket = self._bucket(given) if len(args) < 2 else None
        result = None if bucket is None else self._replayed(self._graphs[bucket], given)
        return self._eager(*args, **kwargs) if result is None else result

    def _replayed(self, graph: Graph, given: dict[str, Any]) -> ModelOutput | None:
        """What the graph makes of a call; None if a sentence has a gap or padding before it, which it cannot do."""
        rows, length = given["input_ids"].shape
        mask, recorder = given.get("attention_mask"), self._recorder
        assert recorder is not None
        with self._lock, recorder.in_order():
            answer = None if mask is None else recorder.ask(is_prefix(mask.bool()))
            graph.buffers.fill(given, rows, length)
            output = graph.replay()
            cut = {
                name: self._cut(name, value, rows, length).clone() for name, value in output.items()
            }
            # Only now, when the GPU has something to do.
            if answer is not None and not answer():
                return None
        return type(output)(**cut)

    def _bucket(self, given: dict[str, Any]) -> Bucket | None:
        """The smallest bucket for a call, or None where it must run as without graphs."""
        ids = given.get("input_ids")
        tensors = {name: value for name, value in given.items() if value is not None}
        if (
            not set(tensors) <= set(self._names)
            or not all(torch.is_tensor(value) for value in tensors.values())
            or ids is None
            or ids.ndim != 2
            or ids.device != self._device
            or any(value.shape != ids.shape for value in tensors.values())
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(ids.device.type)
            or dispatch.capturing(ids.device)
            or not self._is_valid()
        ):
            return None
        return choose_bucket(list(self._graphs), ids.shape[0], ids.shape[1])

    def _is_valid(self) -> bool:
        if self._graphs and self._version != self._encoder.version:
            self._graphs.clear()
            warnings.warn(
                "the model was moved, cast or loaded again: its CUDA graphs are dropped; unfuse_ it and fuse_ it again",
                stacklevel=3,
            )
        return bool(self._graphs)

    @contextlib.contextmanager
    def _padded(self) -> Iterator[None]:
        """How much padding there is decides the shapes without it, and a graph has one shape."""
        encoder = self._encoder
        before, encoder.unpad, encoder.prefix = encoder.unpad, False, True
        try:
            yield
        finally:
            encoder.unpad, encoder.prefix = before, False

    def _buffers(self, bucket: Bucket, length: int) -> Buffers:
        """Filled with sentences of a length."""
        buffers = Buffers(bucket, self._names, self._padding, self._device)
        buffers.fill({}, bucket[0], length)
        return buffers

    def _record(self, bucket: Bucket, recorder: CudaRecorder) -> Graph:
        # Not full: transformers leaves the mask out where it tells nothing, and then another attention would be warm.
        buffers = self._buffers(bucket, max(bucket[1] - 1, 1))
        return Graph(buffers, recorder.record(lambda: self._eager(**buffers.inputs)))

    def _length_dimensions(self) -> dict[str, list[int]]:
        """Which dimensions of each result follow the length of the input."""
        shapes = []
        for length in (5, 6):
            output = self._eager(**self._buffers((1, length), length).inputs)
            shapes.append({name: value.shape for name, value in output.items()})
        return {
            name: [d for d, (a, b) in enumerate(zip(shapes[0][name], shape, strict=True)) if a != b]
            for name, shape in shapes[1].items()
        }

    def _cut(self, name: str, value: Tensor, rows: int, length: int) -> Tensor:
        value = value[:rows]
        for dimension in self._lengths[name]:
            value = value.narrow(dimension, 0, length)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no graphs: they read the tensors of the original."""
        return {**vars(self), "_graphs": {}, "_recorder": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


def choose_bucket(buckets: Sequence[Bucket], rows: int, length: int) -> Bucket | None:
    """The smallest bucket that holds (rows, length) and is not mostly padding, or None.

    >>> choose_bucket([(1, 32), (8, 32), (8, 128)], 5, 30)
    (8, 32)
    >>> choose_bucket([(8, 128), (64, 512)], 9, 16) is None
    True
    """
    for batch, longest in sorted(buckets, key=lambda bucket: bucket[0] * bucket[1]):
        tokens = batch * longest
        if rows <= batch and length <= longest and rows * length > 0:
            filled = tokens <= FEW_TOKENS or rows * length >= LEAST_FILLED * tokens
            return (batch, longest) if filled else None
    return None


def graph_(
    model: PreTrainedModel, encoder: FusedEncoder, buckets: Sequence[Bucket], recorder: CudaRecorder
) -> None:
    """Put graphs for the buckets in the place of the model's forward pass; ``unfuse_`` takes them out again."""
    vars(model)["forward"] = GraphedForward(model, encoder, buckets, recorder)
