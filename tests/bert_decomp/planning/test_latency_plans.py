"""Plans for a latency: met on the whole model's clock, though tables, clocks and machines are not what they seem."""

import itertools

import pytest
import torch
from spectra import ONES, SHAPES, decomposed, falling
from tiny_models import tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition import search as goals
from bert_decomp.decomposition.search import plan_for_latency
from bert_decomp.errors import UserError
from bert_decomp.planning import OperatorTable, for_latency, waterfill, within_fraction


class CountingTable(OperatorTable):
    """Seconds that are the number of multiplications: what the search does can then be checked exactly."""

    def _measure(self, in_features, out_features, rank):
        return float(
            in_features * out_features if rank == 0 else rank * (in_features + out_features)
        )


def latency_of(plan, outside=100.0, slowdown=1.2):
    dense = sum(rows * columns for rows, columns in SHAPES.values())
    return outside + slowdown * (
        dense if plan is None else sum(entry.weights for entry in plan.matrices.values())
    )


def test_a_latency_is_met_though_the_whole_model_is_slower_than_its_operators():
    table = CountingTable(8, torch.device("cpu"))
    plan = for_latency(
        700.0,
        SHAPES,
        lambda share: waterfill(SHAPES, falling(), ONES, share),
        0.132,
        table,
        latency_of,
    )
    assert abs(latency_of(plan) - 700.0) <= 0.05 * 700.0
    for target, word in ((5000.0, "dense model takes"), (101.0, "the smallest takes")):
        with pytest.raises(UserError, match=word):
            for_latency(
                target,
                SHAPES,
                lambda share: waterfill(SHAPES, falling(), ONES, share),
                0.132,
                table,
                latency_of,
            )


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("share", [0.4, 0.55, 0.7])
def test_a_latency_is_met_though_the_clock_is_noisy_and_large_ranks_cost_more_than_the_table_says(
    share, multiple
):
    shapes = {
        f"{part}{layer}": shape
        for layer in range(4)
        for part, shape in (("a", (192, 192)), ("b", (768, 192)), ("c", (192, 768)))
    }
    noise, dense = (
        torch.Generator().manual_seed(5),
        sum(rows * columns for rows, columns in shapes.values()),
    )

    def true(plan):
        return 3e5 + 1.3 * (
            dense
            if plan is None
            else sum(entry.weights for entry in plan.matrices.values()) ** 1.1 / 4
        )

    def measured(plan):
        return true(plan) * (1 + 0.01 * float(torch.rand(1, generator=noise)))

    target = share * true(None)
    plan = for_latency(
        target,
        shapes,
        lambda fraction: within_fraction(shapes, fraction, multiple),
        0.06,
        CountingTable(8, torch.device("cpu")),
        measured,
    )
    assert abs(true(plan) - target) <= 0.05 * target
    assert all(entry.rank is None or entry.rank % multiple == 0 for entry in plan.matrices.values())


def test_a_latency_is_met_on_a_machine_that_gets_slower(monkeypatch):
    """A stand-in for the clock, on which a model takes a second a parameter, and 10 % more at each measurement."""
    model, speeds = tiny_model("bert"), (1.1**count for count in itertools.count())
    size = sum(parameter.numel() for parameter in model.parameters())

    def slower(calls, seconds, **_):
        speed = next(speeds)
        return {
            name: [speed * sum(parameter.numel() for parameter in call.func.parameters())]
            for name, call in calls.items()
        }

    monkeypatch.setattr(goals, "take_turns", slower)
    plan = plan_for_latency(
        model,
        DecompositionConfig(
            "svd",
            min_rank=1,
            latency_ms=0.7 * size * 1e3,
            latency_batch_size=1,
            latency_seq_length=8,
        ),
        None,
        dense_ms=size * 1e3,
    )
    student = decomposed(model, DecompositionConfig("svd"), None, plan)
    assert sum(parameter.numel() for parameter in student.parameters()) / size == pytest.approx(
        0.7, rel=0.05
    )


@pytest.mark.parametrize(
    "options,units",
    [
        ({"latency_ms": 5.0}, "structured"),
        ({"latency_ms": 5.0, "units": "mixed"}, "mixed"),
        ({"latency_ms": 5.0, "method": "svd"}, "matrices"),
        ({"latency_ms": 5.0, "share_qkv": True}, "matrices"),
        ({"latency_ms": 5.0, "allocation": "sensitivity"}, "matrices"),
        ({"encoder_fraction": 0.25}, "matrices"),
    ],
)
def test_a_latency_takes_fewer_heads_unless_something_asks_for_factors(options, units):
    assert DecompositionConfig(**options).units == units
