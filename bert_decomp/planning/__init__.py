"""Which rank each matrix gets. A ``RankPlan`` is data that a user may edit; applying it is ``decompose_``'s job.

``plan`` holds the data, ``allocate`` spreads a budget over the matrices, ``sensitivity`` measures what each matrix is
worth, ``targets`` turns what a user wants (size, FLOPs, latency, quality) into a budget.
"""

from .allocate import fraction_of, least_rank, shapes_of, uniform, waterfill, within_parameters
from .plan import MatrixPlan, RankPlan, read_plan
from .sensitivity import measure_sensitivity
from .targets import OperatorTable, budget_for_flops, budget_for_whole, for_latency, for_quality

__all__ = [
    "MatrixPlan",
    "OperatorTable",
    "RankPlan",
    "read_plan",
    "budget_for_flops",
    "budget_for_whole",
    "for_latency",
    "for_quality",
    "fraction_of",
    "least_rank",
    "measure_sensitivity",
    "shapes_of",
    "uniform",
    "waterfill",
    "within_parameters",
]
