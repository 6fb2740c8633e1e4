"""Where the features of each architecture are: one row of data a family, no copied model classes.

Names are relative to one encoder layer. A joint query-key-value projection is written as one name for all three, and
its output is read in thirds. An architecture without a row still works for everything that needs only layer outputs
and logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """Names of the linear layers inside one encoder layer, by what they compute.

    ``position`` is the argument of the layer's forward that brings relative positions into the attention scores, if
    there is one: ``position_bias`` is added to them, ``position_embeddings`` (cosine, sine) rotate query and key.
    """

    query: str
    key: str
    value: str
    attention_output: str
    ffn_intermediate: str
    ffn_output: str
    # Where each half's sum is normalised, in architectures that normalise after each half.
    attention_norm: str | None = None
    ffn_norm: str | None = None
    position: str | None = None


# The linear layers among a family's parts, in the order of their work.
LINEARS = ("query", "key", "value", "attention_output", "ffn_intermediate", "ffn_output")

_BERT = Family(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "attention.output.LayerNorm",
    "output.LayerNorm",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Family(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "sa_layer_norm",
        "output_layer_norm",
    ),
    "mpnet": Family(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
        "attention.LayerNorm",
        "output.LayerNorm",
        "position_bias",
    ),
    "modernbert": Family(
        "attn.Wqkv",
        "attn.Wqkv",
        "attn.Wqkv",
        "attn.Wo",
        "mlp.Wi",
        "mlp.Wo",
        position="position_embeddings",
    ),
}


def encoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder's layers by qualified name, in order: the members of its longest ``nn.ModuleList``.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     intermediate_size=8)
    >>> list(encoder_layers(BertModel(config)))
    ['encoder.layer.0', 'encoder.layer.1']
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return {}
    name, layers = max(lists, key=lambda item: len(item[1]))
    return {f"{name}.{index}": layer for index, layer in enumerate(layers)}


def submodule(module: nn.Module, name: str | None, kind: type[Module]) -> Module:
    """The submodule called ``name``, which must be a ``kind``.

    >>> submodule(nn.Sequential(nn.Linear(2, 3)), "0", nn.Linear)
    Linear(in_features=2, out_features=3, bias=True)

    Raises:
        TypeError: it is something else, or ``name`` is None.
    """
    result = None if name is None else module.get_submodule(name)
    if not isinstance(result, kind):
        raise TypeError(
            f"{name} of {type(module).__name__} is {type(result).__name__}, not {kind.__name__}"
        )
    return result


def attention_window(config: Any, layer: int) -> int | None:
    """How far from itself a token of this layer attends, or None where it sees all tokens."""
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens that the model takes at most, or None where nothing says so."""
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if not isinstance(positions, nn.Embedding):
        return getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its relatives count positions from the one after padding's.
    return positions.num_embeddings - (
        0 if positions.padding_idx is None else positions.padding_idx + 1
    )
