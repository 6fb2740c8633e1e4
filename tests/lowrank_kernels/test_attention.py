"""``attention`` by heads of any size: Triton against float64 and the library, and where it is asked for."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from kernel_cases import DEVICE, assert_no_worse, rows
from torch import Tensor

from lowrank_kernels import backends
from lowrank_kernels.problem import Problem
from lowrank_kernels.triton_backend.tiles import attention_space

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton needs a GPU or its interpreter",
)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def stacked(
    count: int, heads: int, of_score: int, of_value: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value as views of one matrix."""
    widths = [heads * of_score, heads * of_score, heads * of_value]
    return list(rows(count, sum(widths), dtype=dtype).split(widths, 1))


def call(backend: str, given: list[Tensor], *where, **tile) -> list[Tensor]:
    *bounds, heads = where
    return [backends.bind(backend, "attention", (heads,))(*given, *bounds, **tile)[0]]


def check(given: list[Tensor], *where, **tile) -> None:
    exact = call("torch", [part.double() for part in given], *where)
    assert_no_worse(call("triton", given, *where, **tile), call("torch", given, *where), exact)


def alone(given: list[Tensor], lengths: list[int], heads: int) -> Tensor:
    """The definition, sentence by sentence."""
    parts = []
    for query, key, value in zip(*(part.split(lengths) for part in given), strict=True):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_is_attention_within_each_sentence(backend):
    lengths, heads = [5, 17, 1, 9], 3
    given = stacked(
        sum(lengths), heads, 8, 12, torch.float64 if backend == "torch" else torch.float32
    )
    where = (bounds_of(lengths), bounds_of(lengths), max(lengths), max(lengths), heads)
    torch.testing.assert_close(
        call(backend, given, *where)[0], alone(given, lengths, heads), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "of_score", "of_value"),
    [
        ([70, 3], 1, 64, 64),
        ([33], 5, 5, 7),
        ([64, 65], 1, 20, 4),
        ([2, 1, 1, 30], 2, 16, 40),
        ([40], 1, 100, 128),
    ],
    ids=str,
)
def test_it_errs_no_more_than_the_library(lengths, heads, of_score, of_value, dtype):
    """Heads that are no power of two, odd sizes and strides, several blocks of queries and of keys."""
    given = stacked(sum(lengths), heads, of_score, of_value, dtype)
    bounds = bounds_of(lengths)
    check(given, bounds, bounds, max(lengths), max(lengths), heads)


@pytest.mark.parametrize("tile", attention_space(128, 64), ids=str)
def test_every_tile(tile):
    given, bounds = stacked(69, 2, 8, 24, torch.bfloat16), bounds_of([66, 3])
    check(given, bounds, bounds, 66, 66, 2, tile=tile)


def test_one_query_a_sentence_and_sentences_that_ask_nothing():
    """The last layer of a classifier; and padding, which lies between the sentences and asks nothing."""
    lengths, heads = [6, 2, 40, 3], 2
    query, key, value = stacked(sum(lengths), heads, 12, 4, torch.float32)
    bounds = bounds_of(lengths)
    whole = call("triton", [query, key, value], bounds, bounds, 40, 40, heads)[0]
    first = query[bounds[:-1].long()]
    asking = torch.arange(5, dtype=torch.int32, device=DEVICE)
    mine = call("triton", [first, key, value], asking, bounds, 1, 40, heads)[0]
    torch.testing.assert_close(mine, whole[bounds[:-1].long()], rtol=1e-5, atol=1e-6)
    half = asking // 2
    mine = call("triton", [first[1::2], key, value], half, bounds, 1, 40, heads)[0]
    torch.testing.assert_close(mine, whole[bounds[:-1].long()][1::2], rtol=1e-5, atol=1e-6)


def test_a_large_score_and_a_nan_stay_in_their_sentence():
    given, bounds = stacked(12, 1, 16, 16, torch.float32), bounds_of([5, 7])
    given[0][1] *= 1e4
    given[2][6, 3] = torch.nan
    right = alone(given, [5, 7], 1)
    for backend in ("triton", "torch"):
        mine = call(backend, given, bounds, bounds, 7, 7, 1)[0]
        assert torch.equal(mine.isnan(), right.isnan()) and not mine[:5].isnan().any()
        torch.testing.assert_close(mine[:5], right[:5], rtol=1e-5, atol=1e-6)


def test_nothing_to_do_and_heads_that_are_too_large():
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    given = stacked(0, 2, 4, 8, torch.float32)
    assert call("triton", given, empty, empty, 0, 0, 2)[0].shape == (0, 16)
    problem = Problem("attention", 8, 2 * 64, 2 * 136, 0, torch.bfloat16, 2)
    assert "heads of 136" in backends.why_not("triton", problem, DEVICE, prepared=True)
