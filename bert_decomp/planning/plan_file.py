"""Reading a plan file of either kind."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.json import read_json
from .blocks import VERSION, BlockPlan
from .plan import RankPlan

# Bytes of a plan file: an entry has some 150, a large model some 150 entries.
PLAN_LIMIT = 2**20


def read_plan(path: str | Path) -> RankPlan | BlockPlan:
    """Read a plan file: of matrices (version 1) or of blocks (version 2).

    Raises:
        UserError: it is absent, unreadable or no rank plan.
    """
    value = read_json(path, PLAN_LIMIT)
    if isinstance(value, dict) and value.get("version") == VERSION:
        return BlockPlan.from_dict(value)
    return RankPlan.from_dict(value)


def read_rank_plan(path: str | Path) -> RankPlan:
    """Read a plan file of matrices.

    Raises:
        UserError: it is absent, unreadable or of another kind.
    """
    plan = read_plan(path)
    if not isinstance(plan, RankPlan):
        raise UserError(f"{path} is a plan of blocks, and a plan of matrices is needed")
    return plan
