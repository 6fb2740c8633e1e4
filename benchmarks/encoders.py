"""The encoders that are timed, with random weights, in every form, and the batches that they are timed on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from bert_decomp.config import PAPER_FRACTION
from bert_decomp.models.architectures import FAMILIES, LINEARS, encoder_layers
from bert_decomp.models.selection import select_linears
from bert_decomp.runtime import REPLACEMENTS, fuse_
from lowrank_kernels import LowRankLinear

from .records import read_record

# The record of benchmarks/results/methods.jsonl whose ranks the mixed plan has.
PLAN = "coupled-waterfill/questions-42-0.25-before"
MINILM_LAYERS = 6
SHAPES = {
    "bert-base": {},
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": MINILM_LAYERS,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}
# 32 quantiles of the lengths, in tokens, of 2066 movie-review sentences (the movies task's held-out ones).
# fmt: off
MIX = (
    8, 10, 12, 13, 15, 16, 17, 18, 20, 21, 22, 23, 23, 24, 25, 26,
    27, 28, 28, 29, 31, 32, 33, 34, 35, 36, 38, 40, 42, 44, 47, 53,
)
# fmt: on


def per_linear(model: nn.Module) -> nn.Module:
    """Each factored layer in its inference form by itself; on a GPU the layer as it is, served by the dispatcher."""
    if next(model.parameters()).is_cuda:
        return model
    for name, module in list(model.named_modules()):
        if type(module) in REPLACEMENTS:
            model.set_submodule(name, REPLACEMENTS[type(module)](module))
    return model


# Form -> how it is made of a low-rank model, in place.
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "unfused": lambda model: model,
    "fused per linear": per_linear,
    "fused runtime": fuse_,
}


def planned(shape: str, layers: int) -> dict[str, list[int | None]]:
    """Ranks at a quarter of the encoder by role and layer, None for dense."""
    ranks, family = read_record("methods", PLAN)["ranks"], FAMILIES["bert"]
    scale = max(layers // MINILM_LAYERS, 1)
    return {
        role: [
            rank and max(8, 8 * round(scale * rank / 8))
            for rank in (
                ranks[f"bert.encoder.layer.{layer // scale}.{getattr(family, role)}"]
                for layer in range(layers)
            )
        ]
        for role in LINEARS
    }


def low_rank(model: nn.Module, ranks: dict[str, list[int | None]]) -> nn.Module:
    """A copy of ``model`` with random factors: ``ranks`` by role and layer, None for dense."""
    model = copy.deepcopy(model)
    family = FAMILIES[model.config.model_type]
    for index, layer in enumerate(encoder_layers(model).values()):
        for role, by_layer in ranks.items():
            linear = layer.get_submodule(getattr(family, role))
            if by_layer[index] is not None:
                factored = LowRankLinear(linear.in_features, linear.out_features, by_layer[index])
                layer.set_submodule(getattr(family, role), factored.to(linear.weight))
    return model.eval()


def limit(dense: nn.Module, student: nn.Module) -> float:
    """Multiplications of the encoder's linear layers, dense over low-rank: the speed-up that they allow."""
    kept = sum(
        module.weight.numel()
        if isinstance(module, nn.Linear)
        else module.down.numel() + module.up.numel()
        for layer in encoder_layers(student).values()
        for module in layer.modules()
        if isinstance(module, (nn.Linear, LowRankLinear))
    )
    return sum(linear.weight.numel() for linear in select_linears(dense).values()) / kept


def inputs_of(point: str, vocabulary: int, device: str) -> tuple[dict[str, Tensor], int]:
    """A batch for ``batch x length`` or ``batch x mix`` (padded to its longest), and its number of real tokens."""
    batch, length = point.split("x", 1) if not point.endswith("xmix") else (point[:-4], "mix")
    batch = int(batch)
    generator = torch.Generator().manual_seed(0)
    if length == "mix":
        # Every 32 / batch-th quantile, so that a small batch has the same spread.
        spread = [MIX[int((index + 0.5) * len(MIX) / batch) % len(MIX)] for index in range(batch)]
        lengths = torch.tensor(spread)[torch.randperm(batch, generator=generator)]
    else:
        lengths = torch.full((batch,), int(length))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, vocabulary, mask.shape, generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, int(lengths.sum())


def build(shape: str, dtype: torch.dtype, device: str) -> tuple[dict, dict, dict[str, float]]:
    """Every (size, form) of a shape; their twins without packing, for graphs and compilers; each size's limit."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SHAPES[shape])
    dense = AutoModelForSequenceClassification.from_config(config).eval().to(device, dtype)
    layers, paper = config.num_hidden_layers, {}
    for role in LINEARS:
        weight = (
            next(iter(encoder_layers(dense).values()))
            .get_submodule(getattr(FAMILIES["bert"], role))
            .weight
        )
        paper[role] = [
            245
            if shape == "bert-base"
            else int(PAPER_FRACTION * weight.numel() / sum(weight.shape))
        ] * layers
    sizes = {
        "rank 245" if shape == "bert-base" else "48 %": paper,
        "25 %, mixed ranks": planned(shape, layers),
    }
    # The dense model's own inference form tells what dropping padding brings from what the ranks bring.
    models = {("dense", "dense"): dense, ("dense", "fused runtime"): fuse_(copy.deepcopy(dense))}
    twins, limits = {("dense", "fused runtime"): fuse_(copy.deepcopy(dense), unpad=False)}, {}
    for size, ranks in sizes.items():
        student = low_rank(dense, ranks)
        limits[size] = limit(dense, student)
        for form, make in FORMS.items():
            models[size, form] = make(copy.deepcopy(student))
        twins[size, "fused runtime"] = fuse_(copy.deepcopy(student), unpad=False)
    return models, twins, limits
