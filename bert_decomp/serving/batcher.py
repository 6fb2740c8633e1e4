"""Texts of all requests, answered together: while the model works on a batch, the next one gathers.

Nothing waits on purpose. A batch is what has come in the meantime, oldest first, up to the predictor's token budget.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..prediction.predictor import Predictor

Result = TypeVar("Result")


class Overloaded(Exception):
    """More tokens wait than may."""


class TooLong(ValueError):
    """A text has more tokens than the model takes, or a request more than may wait."""


@dataclass
class _Item:
    """A text, or a window of one, on its way: what the model takes of it, its tokens, and where its outputs go."""

    encoded: dict[str, list[int]]
    length: int
    future: asyncio.Future[np.ndarray]


class Batcher:
    """Outputs of a predictor for requests that come at the same time.

    Args:
        queue_tokens: how many tokens may wait, those in work included.
        on_batch: called with the texts, the tokens and the seconds of each batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        queue_tokens: int,
        on_batch: Callable[[int, int, float], None] | None = None,
    ):
        self.predictor, self.queue_tokens, self.on_batch = predictor, queue_tokens, on_batch
        self.waiting = 0
        self._items: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        # One thread each: a tokenizer must not be used by two at once, and a model should not.
        self._tokenizing, self._computing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Answer nothing more."""
        if self._task is not None:
            self._task.cancel()
        self._tokenizing.shutdown(cancel_futures=True)
        self._computing.shutdown(cancel_futures=True)

    async def outputs(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        truncate: bool = False,
    ) -> tuple[np.ndarray, int]:
        """Outputs (texts, width) in float32, and the tokens of all texts.

        Raises:
            TooLong: a text has more tokens than the model takes, and is not to be cut.
            Overloaded: too much waits already.
        """
        limit = self.predictor.max_length
        encoded = await self._tokenized(
            lambda: self.predictor.encode(
                [texts] if pairs is None else [texts, pairs], limit if truncate else limit + 1
            )
        )
        lengths = self.predictor.lengths(encoded)
        if not truncate and max(lengths) > limit:
            place = next(row for row, length in enumerate(lengths) if length > limit)
            raise TooLong(
                f"text {place} has more than {limit} tokens; shorten it, or ask for it to be cut with truncate: true"
            )
        return np.stack(await self._answered(encoded, lengths)), sum(lengths)

    async def found(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> tuple[list[dict[str, Any]], int]:
        """What a model says whose answers are places in texts, a dict for each, and the tokens of all windows.

        Raises:
            Overloaded: too much waits already.
        """
        given = [texts] if pairs is None else [texts, pairs]
        encoded, places = await self._tokenized(lambda: self.predictor.windows(given))
        lengths = self.predictor.lengths(encoded)
        outputs = await self._answered(encoded, lengths)
        return self.predictor.found(outputs, places, given), sum(lengths)

    async def _tokenized(self, work: Callable[[], Result]) -> Result:
        if self.waiting > self.queue_tokens:
            raise Overloaded
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def _answered(
        self, encoded: dict[str, list[list[int]]], lengths: Sequence[int]
    ) -> list[np.ndarray]:
        """The outputs of all rows, each in whatever batch it is computed."""
        loop = asyncio.get_running_loop()
        if sum(lengths) > self.queue_tokens:
            raise TooLong(f"the request has more than {self.queue_tokens} tokens; send fewer texts")
        if self.waiting + sum(lengths) > self.queue_tokens:
            raise Overloaded
        items = [
            _Item(
                {name: values[row] for name, values in encoded.items()},
                length,
                loop.create_future(),
            )
            for row, length in enumerate(lengths)
        ]
        self.waiting += sum(lengths)
        self._items.extend(items)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(item.future for item in items)))
        finally:
            self.waiting -= sum(lengths)
            for item in items:
                item.future.cancel()

    def _take(self) -> list[_Item]:
        """The oldest texts up to the budget; those that nobody waits for any more are dropped."""
        batch: list[_Item] = []
        longest = 0
        while self._items:
            item = self._items[0]
            if item.future.done():
                self._items.popleft()
                continue
            longest = max(longest, item.length)
            if batch and (len(batch) + 1) * longest > self.predictor.batch_tokens:
                break
            batch.append(self._items.popleft())
        return batch

    def _compute(self, batch: list[_Item]) -> list[np.ndarray]:
        encoded = {name: [item.encoded[name] for item in batch] for name in batch[0].encoded}
        return self.predictor.outputs(encoded, range(len(batch)))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            start = loop.time()
            try:
                outputs = await loop.run_in_executor(self._computing, self._compute, batch)
            except Exception as error:
                for item in batch:
                    if not item.future.done():
                        item.future.set_exception(error)
                continue
            if self.on_batch is not None:
                self.on_batch(len(batch), sum(item.length for item in batch), loop.time() - start)
            for item, row in zip(batch, outputs, strict=True):
                if not item.future.done():
                    item.future.set_result(row)
