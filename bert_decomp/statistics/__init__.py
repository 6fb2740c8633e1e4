"""What enters each linear layer, and how much the loss cares about what leaves it, over real tokens only.

The running sums are float64. The product of each batch is float32, but of inputs shifted by the first batch's mean:
what follows a LayerNorm has a mean far larger than its variance in some features, and the covariance would otherwise
drown in the rounding of E[x] E[x]^T. Layers that read the same tensor (query, key, value) share one entry.

Gradients are label-free: of the loss that the kind of task samples (``Kind.sampled_loss``). A classifier's is the
cross-entropy against a class drawn from the model's *own* distribution at a temperature, whose mean outer product is
the Fisher information (Martens, JMLR 2020, section 5).
A fine-tuned model is almost certain of most of its training examples, so against their labels nearly all gradients
vanish and a few mistakes decide everything; the temperature gives every example a say.
"""

from .collect import NEEDS, collect_statistics, fingerprint, token_weights
from .embedding import collect_embedding, stored_embedding
from .gradients import CLIP, TEMPERATURE, frozen
from .layerwise import collect_to_file, fitting_layers
from .moments import GradientStatistics, InputStatistics, LayerStatistics, collected
from .store import EmbeddingStatistics, Statistics

__all__ = [
    "CLIP",
    "NEEDS",
    "TEMPERATURE",
    "EmbeddingStatistics",
    "GradientStatistics",
    "InputStatistics",
    "LayerStatistics",
    "Statistics",
    "collect_embedding",
    "collect_statistics",
    "collect_to_file",
    "collected",
    "fingerprint",
    "fitting_layers",
    "frozen",
    "stored_embedding",
    "token_weights",
]
