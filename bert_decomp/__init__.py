"""Low-rank BERT: factor a fine-tuned encoder, recover its quality by feature distillation, run it fused.

Importing this package registers the low-rank format with transformers, after which
``AutoModelForSequenceClassification.from_pretrained`` loads a saved low-rank model.
"""

from .config import DecompositionConfig
from .decomposition.decompose import decompose_
from .distillation.losses import DistillationConfig
from .distillation.trainer import DistillationTrainer
from .errors import UserError
from .models.saving import LowRankConfig, save
from .models.selection import select_linears
from .statistics import Statistics, collect_statistics

__version__ = "0.2.0"

__all__ = [
    "DecompositionConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "LowRankConfig",
    "Statistics",
    "UserError",
    "collect_statistics",
    "decompose_",
    "save",
    "select_linears",
]
