"""The models that stages time: compressed by ranks, and by the stored plans of units."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from benchmarks.encoders import SHAPES, build
from benchmarks.units_time import dense_model, stored_twins
from bert_decomp.runtime import fuse_

from .results import Setting

TOY_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 90,
}


def models_of(
    setting: Setting, dtype: torch.dtype | None = None
) -> tuple[dict, dict, dict[str, float]]:
    """The models of ``benchmarks.encoders`` at the setting's shape, on the device of choice."""
    SHAPES.setdefault("toy", TOY_SHAPE)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return build(setting.shape, dtype or getattr(torch, setting.dtype), device)


def models_by_plan(setting: Setting) -> dict[str, PreTrainedModel]:
    """BERT-base's shape on the CPU, dense and by the stored plans of units (see ``benchmarks.units_time``)."""
    torch.manual_seed(0)
    toy = setting.seconds == 0
    factor = 1 if toy else 2
    dense = dense_model(factor)
    return {"dense": dense, **stored_twins(dense, [0.25] if toy else [0.25, 0.125], factor)}


def placed(setting: Setting, model: PreTrainedModel) -> PreTrainedModel:
    """The model on the device of choice and in the setting's dtype, for inference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device, getattr(torch, setting.dtype))


def units_of(setting: Setting) -> tuple[dict, dict, dict[str, float]]:
    """``models_by_plan`` but for those of matrices alone, as ``models_of`` has its own."""
    models, without_packing, weights = {}, {}, {}
    for name, model in models_by_plan(setting).items():
        if name.startswith("matrices"):
            # They are in the table of encoders.
            continue
        model = placed(setting, model)
        models[name, "dense" if name == "dense" else "unfused"] = model
        models[name, "fused runtime"] = fuse_(copy.deepcopy(model))
        without_packing[name, "fused runtime"] = fuse_(copy.deepcopy(model), unpad=False)
        weights[name] = sum(p.numel() for p in model.bert.encoder.parameters())
    whole = weights.pop("dense")
    return models, without_packing, {name: whole / kept for name, kept in weights.items()}
