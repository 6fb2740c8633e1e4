"""Plans of several sizes: each is within its budget and inside the next larger one."""

import copy
import itertools
import json

import pytest
from nested_cases import FRACTIONS, every_units, nested

from bert_decomp import DecompositionConfig, UserError
from bert_decomp.planning import RankPlan
from bert_decomp.planning.blocks import BlockPlan


@every_units
def test_plans_are_nested_and_within_their_sizes(units):
    _, plan = nested(units=units)
    assert plan.fractions == FRACTIONS
    for fraction in FRACTIONS:
        assert fraction - 0.1 < plan.at(fraction).encoder_fraction <= fraction
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    if units == "matrices":
        for matrix in plan.matrices.values():
            ranks = [matrix.rank or 0, *matrix.smaller_ranks]
            assert ranks == sorted(ranks, reverse=True)
        return
    for larger, smaller in itertools.pairwise(plan.nested.values()):
        assert all(entry.within(larger[name]) for name, entry in smaller.items())


def test_a_plan_of_blocks_with_wrong_sizes_is_refused():
    value = nested(units="structured")[1].to_dict()
    name = next(iter(value["layers"]))
    for change, message in (
        ({"fractions": [0.7]}, "two or more"),
        ({"fractions": [0.7, 0.4]}, "not as many smaller sizes"),
        ({"smaller": value["smaller"][:1]}, "not as many smaller sizes"),
        ({"smaller": value["smaller"][::-1]}, "keeps more"),
        ({"smaller": [{}, {}]}, "no layers"),
        ({"smaller": [{"x": value["layers"][name]}] * 2}, "other layers"),
    ):
        with pytest.raises(UserError, match=message):
            BlockPlan.from_dict({**value, **change})


def test_a_plan_file_with_wrong_sizes_is_refused():
    value = nested()[1].to_dict()
    name = next(name for name, matrix in value["matrices"].items() if matrix["rank"])
    for change, message in (
        ({"fractions": [0.7]}, "two or more"),
        ({"fractions": [0.7, 0.4, 0.4]}, "do not fall"),
        ({"fractions": [0.7, 0.4, "a"]}, "shares between"),
        ({"fractions": [0.7, 0.4]}, "has not 1 smaller_ranks"),
    ):
        with pytest.raises(UserError, match=message):
            RankPlan.from_dict({**value, **change})
    for ranks in ([1, 99], [99, 1], [1, True], [1, 0], 3):
        changed = copy.deepcopy(value)
        changed["matrices"][name]["smaller_ranks"] = ranks
        with pytest.raises(UserError, match="smaller_ranks"):
            RankPlan.from_dict(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested_fractions": [0.5]}, "two shares or more"),
        ({"nested_fractions": [0.5, 0.5]}, "two shares or more"),
        ({"nested_fractions": [1.5, 0.5]}, "two shares or more"),
        ({"nested_fractions": [0.5, 0.2], "encoder_fraction": 0.5}, "both set the size"),
        ({"nested_fractions": [0.5, 0.2], "anchored": True}, "anchored fits"),
        ({"nested_fractions": [0.5, 0.2], "units": "mixed"}, "units='matrices' or 'structured'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DecompositionConfig(**options)
