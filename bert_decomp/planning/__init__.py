"""Which rank each matrix gets. A ``RankPlan`` is data that a user may edit; applying it is ``decompose_``'s job.

``plan`` holds the data, ``ranks`` makes one from a configuration, ``allocate`` spreads a budget over the matrices,
``sensitivity`` measures what each matrix is worth, ``budgets`` and ``latency`` turn what a user wants (a size, FLOPs, a
drop, a latency) into a budget, and ``embedding`` is the word embedding's part.
"""

from .allocate import (
    Allocate,
    Shapes,
    fraction_of,
    least_rank,
    shapes_of,
    uniform,
    waterfill,
    within_fraction,
)
from .budgets import budget_for_flops, budget_for_model, encoder_share, for_max_drop
from .latency import OperatorTable, for_latency
from .plan import MatrixPlan, RankPlan
from .plan_file import read_plan, read_rank_plan
from .ranks import (
    RankProblem,
    check_config,
    check_plan,
    layer_statistics,
    log_dense_layers,
    plan_ranks,
    relative_spectra,
    require,
)
from .sensitivity import measure_sensitivity, sensitivity_weights

__all__ = [
    "Allocate",
    "MatrixPlan",
    "OperatorTable",
    "RankPlan",
    "RankProblem",
    "Shapes",
    "budget_for_flops",
    "budget_for_model",
    "check_config",
    "check_plan",
    "encoder_share",
    "for_latency",
    "for_max_drop",
    "fraction_of",
    "layer_statistics",
    "least_rank",
    "log_dense_layers",
    "measure_sensitivity",
    "plan_ranks",
    "read_plan",
    "read_rank_plan",
    "relative_spectra",
    "require",
    "sensitivity_weights",
    "shapes_of",
    "uniform",
    "waterfill",
    "within_fraction",
]
