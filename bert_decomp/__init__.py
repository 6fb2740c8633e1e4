"""Low-rank BERT: factor a fine-tuned encoder, recover its quality by feature distillation, run it fused.

Importing this package registers the low-rank format with transformers, after which
``AutoModelForSequenceClassification.from_pretrained`` loads a saved low-rank model.

    plan = decompose_(model, DecompositionConfig(encoder_fraction=0.25), batches)
    save(model, tokenizer, "compressed")
    fuse_(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_low_rank

if TYPE_CHECKING:
    from .config import DecompositionConfig
    from .decomposition.decompose import decompose_
    from .distillation.distil import distil
    from .distillation.losses import DistillationConfig
    from .distillation.trainer import DistillationTrainer
    from .errors import UserError
    from .evaluation.metrics import evaluate
    from .exporting.export import export
    from .models.linear_pairs import join_linears_, split_linears_
    from .models.saving import LowRankConfig, save
    from .models.selection import select_linears
    from .planning.plan import RankPlan
    from .prediction.predict import predict
    from .prediction.predictor import Predictor
    from .runtime import fuse_, unfuse_
    from .statistics.collect import collect_statistics
    from .statistics.store import Statistics

__version__ = "0.2.0"

__all__ = [
    "DecompositionConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "LowRankConfig",
    "Predictor",
    "RankPlan",
    "Statistics",
    "UserError",
    "collect_statistics",
    "decompose_",
    "distil",
    "evaluate",
    "export",
    "fuse_",
    "join_linears_",
    "predict",
    "save",
    "select_linears",
    "split_linears_",
    "unfuse_",
]

# Where each public name lives. It is imported when it is first used: torch and transformers take seconds.
_HOMES = {
    "DecompositionConfig": "config",
    "DistillationConfig": "distillation.losses",
    "DistillationTrainer": "distillation.trainer",
    "LowRankConfig": "models.saving",
    "Predictor": "prediction.predictor",
    "RankPlan": "planning.plan",
    "Statistics": "statistics.store",
    "UserError": "errors",
    "collect_statistics": "statistics.collect",
    "decompose_": "decomposition.decompose",
    "distil": "distillation.distil",
    "evaluate": "evaluation.metrics",
    "export": "exporting.export",
    "fuse_": "runtime",
    "join_linears_": "models.linear_pairs",
    "predict": "prediction.predict",
    "save": "models.saving",
    "select_linears": "models.selection",
    "split_linears_": "models.linear_pairs",
    "unfuse_": "runtime",
}

register_low_rank()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
