"""Malformed folders of int8 models, as ``Case``s."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch

from .damage import HARMED, HEADERS, RANKS, Case, Damage, edit, filled, flip, tensors

QUERY = "bert.encoder.layer.1.attention.self.query"
FIRST = "bert.encoder.layer.1.intermediate.dense"
LINEAR = {"int8": "linear", "in_features": 36, "out_features": 36, "rank": 0, "bias": True}


def folder(name: str, file: str, damage: Damage, expect: str = "refused") -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        shutil.copytree(base / "int8", folder / "model")
        damage(folder / "model" / file, draw)
        return [str(folder / "model"), "--file", str(base / "dev.csv")]

    return Case("int8", name, "evaluate", expect, lay)


def replaced(name: str, value: torch.Tensor) -> Damage:
    """Another tensor in the place of one."""
    return tensors(lambda found: found.update({name: value}))


def int8_cases() -> list[Case]:
    config, weights = "config.json", "model.safetensors"
    entry: tuple[Any, ...] = ("quantization_config", "modules", QUERY)
    quality = ("quantization_config", "int8")
    bad = {
        **{f"header-{name}": damage for name, damage in HEADERS.items()},
        **{f"file-{name}": damage for name, damage in HARMED.items()},
        "codes-gone": tensors(lambda found: found.pop(f"{QUERY}.up")),
        "codes-float": replaced(f"{QUERY}.up", torch.ones(36, 16)),
        "codes-unsigned": replaced(f"{QUERY}.up", torch.ones(36, 16).byte()),
        "codes-turned": replaced(f"{QUERY}.up", torch.ones(16, 36).char()),
        "codes-none": replaced(f"{QUERY}.up", torch.ones(0, 16).char()),
        "bias-in-bytes": replaced(f"{QUERY}.bias", torch.ones(36).char()),
        "range-nan": replaced(f"{QUERY}.inputs", torch.full((2,), torch.nan)),
        "range-of-three": replaced(f"{QUERY}.inputs", torch.ones(3)),
        "range-turned": replaced(f"{QUERY}.inner", torch.tensor([2.0, 1.0])),
        "range-of-neighbours": replaced(f"{QUERY}.inputs", torch.tensor([-9.0, 9.0])),
        "scale-0": filled(f"{QUERY}.up_scale", 0.0),
        "scale-inf": filled(f"{QUERY}.down_scale", float("inf")),
        "balance-negative": filled(f"{QUERY}.balance", -1.0),
        "outlier-nan": filled(f"{FIRST}.outlier_bias", float("nan")),
        "words-scale-nan": filled("bert.embeddings.word_embeddings.scale", float("nan")),
    }
    changed = {
        **{f"rank-{name}": edit(*entry, "rank", to=value) for name, value in RANKS.items()},
        "width-10^18": edit(*entry, "in_features", to=10**18),
        "width-0": edit(*entry, "out_features", to=0),
        "outliers-10^9": edit(*entry, "outliers", to=10**9),
        "outliers-gone": edit("quantization_config", "modules", FIRST, "outliers", to=0),
        "kind-unknown": edit(*entry, "int8", to="matrix"),
        "kind-list": edit(*entry, "int8", to=["linear"]),
        "entry-more": edit(*entry, "x", to=1),
        "a-module-of-none": edit(*entry[:2], "../../x", to={**LINEAR, "outliers": 0}),
        "a-norm": edit(
            *entry[:2], "bert.embeddings.LayerNorm", to={"int8": "embedding", "rank": 0}
        ),
        "modules-gone": edit(*entry[:2], to={}),
        "one-module-gone": edit(*entry, drop=True),
        "quality-gone": edit(*quality, drop=True),
        "quality-text": edit(*quality, to="good"),
        "quality-nan": edit(*quality, "difference", to=float("nan")),
        "quality-deep": edit(*quality, "exact", to={"x": {"y": 1}}),
        "heads-2": edit("num_attention_heads", to=7),
        "activation": edit("hidden_act", to="silu"),
    }
    return [
        folder("undamaged", config, lambda path, draw: None, "harmless"),
        *(folder(name, weights, damage) for name, damage in bad.items()),
        *(folder(name, config, damage) for name, damage in changed.items()),
        folder("format-2", config, edit("quantization_config", "version", to=2), "harmless"),
        *(folder(f"flip-{number}", weights, flip(), "either") for number in range(8)),
    ]
