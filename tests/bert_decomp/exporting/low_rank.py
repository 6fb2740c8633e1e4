"""The model that tests of exporting write."""

from tiny_models import made_once, tiny_model

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.models.selection import select_linears


@made_once
def low_rank(family="bert"):
    """One layer, factored with mixed ranks up to its last matrix. ModernBERT has two: its attention alternates."""
    depth = "n_layers" if family == "distilbert" else "num_hidden_layers"
    model = tiny_model(family, **{depth: 2 if family == "modernbert" else 1})
    first, *rest, _ = (name for name in select_linears(model) if ".0." in name)
    for names, rank in (([first], 7), (rest, 12)):
        decompose_(model, DecompositionConfig("svd", rank=rank, include=names), progress=False)
    return model
