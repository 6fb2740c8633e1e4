"""Malformed model folders, as ``Case``s: weights, configurations, tokenizers, and code or pickles beside them."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from .damage import (
    BAD_JSON,
    HARMED,
    HARMLESS,
    HEADERS,
    RANKS,
    Case,
    Damage,
    edit,
    filled,
    flip,
    tensors,
)

QUERY = "bert.encoder.layer.1.attention.self.query"


def model(
    name: str, file: str, damage: Damage, expect: str = "refused", main: str = "evaluate"
) -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        shutil.copytree(base / "model", folder / "model")
        damage(folder / "model" / file, draw)
        return [
            str(folder / "model"),
            *(
                ["--file", str(base / "dev.csv")]
                if main == "evaluate"
                else ["--format", "torch-export", "--output", str(folder / "out" / "model.pt2")]
            ),
        ]

    return Case("model", name, main, expect, lay)


def canary(path: Path, draw: random.Random) -> None:
    """Code beside the model that would leave a file behind if it ran."""
    code = "open('CANARY', 'w').close()\n".replace(
        "CANARY", str(path.parent.parent.parent.parent / "canary")
    )
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__"):
        (path.parent / f"{name}.py").write_text(code)
    edit(
        "auto_map",
        to={
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForSequenceClassification": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", None],
        },
    )(path, draw)


class Opened:
    """Unpickled, this makes the canary."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def pickled(beside: bool) -> Damage:
    """``pytorch_model.bin`` with a call in it, beside or in place of safetensors."""

    def damage(path: Path, draw: random.Random) -> None:
        torch.save(
            {"x": Opened(path.parent.parent.parent.parent / "canary")},
            path.parent / "pytorch_model.bin",
        )
        if not beside:
            path.unlink()

    return damage


def index(target: str) -> Damage:
    """The weights under an index that names ``target`` as their file."""

    def damage(path: Path, draw: random.Random) -> None:
        names = list(load_file(path))
        shutil.move(path, path.parent.parent / "elsewhere.safetensors")
        (path.parent / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)})
        )

    return damage


def tokenizer_ids(path: Path, draw: random.Random) -> None:
    values = json.loads(path.read_text())
    values["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [10**6]
    path.write_text(json.dumps(values))


def model_cases() -> list[Case]:
    config, weights, words, settings = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    low = ("quantization_config", "modules", QUERY)
    out = [
        model("undamaged", config, lambda path, draw: None, "harmless"),
        model("undamaged", config, lambda path, draw: None, "harmless", "export"),
    ]
    for file in (config, weights, words):
        out += [model(f"{file}-{name}", file, damage) for name, damage in HARMED.items()]
    out += [model(f"{config}-{name}", config, damage) for name, damage in BAD_JSON.items()]
    out += [
        model(f"{config}-{name}", config, damage, "harmless")
        for name, damage in HARMLESS.items()
        if name != "byte-order-mark"
    ]
    out += [
        model(f"{settings}-{name}", settings, BAD_JSON[name])
        for name in ("deep-lists", "a-list", "nul-inside", "deep-objects")
    ]
    out += [
        model(f"{words}-{name}", words, BAD_JSON[name])
        for name in ("deep-lists", "deep-and-closed", "a-number")
    ]
    out += [
        model(f"flip-{file}-{number}", file, flip(), "either")
        for file in (config, words, settings)
        for number in range(8)
    ]
    out += [
        model(
            f"flip-header-{number}",
            weights,
            flip(lambda content: (0, 8 + struct.unpack("<Q", content[:8])[0])),
            "either",
        )
        for number in range(10)
    ]
    out += [
        model(
            f"flip-weights-{number}",
            weights,
            flip(lambda content: (len(content) // 2, len(content))),
            "either",
        )
        for number in range(4)
    ]
    out += [model(f"weights-{name}", weights, damage) for name, damage in HEADERS.items()]
    out += [
        model("weights-nan", weights, filled(f"{QUERY}.up", float("nan"))),
        model("weights-nan-exported", weights, filled(f"{QUERY}.up", float("nan")), main="export"),
        model("weights-inf", weights, filled("classifier.weight", float("inf"))),
        model(
            "weights-nan-embeddings",
            weights,
            filled("bert.embeddings.word_embeddings.weight", float("nan")),
        ),
        model(
            "weights-int",
            weights,
            tensors(
                lambda found: found.update({f"{QUERY}.up": torch.ones(36, 5, dtype=torch.int32)})
            ),
        ),
        model(
            "weights-bool",
            weights,
            tensors(
                lambda found: found.update({f"{QUERY}.up": torch.ones(36, 5, dtype=torch.bool)})
            ),
        ),
        model(
            "weights-complex",
            weights,
            tensors(
                lambda found: found.update(
                    {f"{QUERY}.up": torch.ones(36, 5, dtype=torch.complex64)}
                )
            ),
        ),
        model(
            "weights-turned",
            weights,
            tensors(lambda found: found.update({f"{QUERY}.up": torch.ones(5, 36)})),
        ),
        model(
            "weights-flat",
            weights,
            tensors(lambda found: found.update({f"{QUERY}.up": torch.ones(180)})),
        ),
        model(
            "weights-scalar",
            weights,
            tensors(lambda found: found.update({f"{QUERY}.up": torch.tensor(1.0)})),
        ),
        model("weights-none", weights, tensors(lambda found: found.clear())),
        model(
            "weights-half",
            weights,
            tensors(
                lambda found: found.update(
                    {
                        name: value.half()
                        for name, value in found.items()
                        if value.is_floating_point()
                    }
                )
            ),
            "harmless",
        ),
        model("weights-one-missing", weights, tensors(lambda found: found.pop(f"{QUERY}.down"))),
        model(
            "weights-one-foreign",
            weights,
            tensors(lambda found: found.update({"../../x": torch.ones(3)})),
        ),
        model("index-out-of-the-folder", weights, index("../elsewhere.safetensors")),
        model("index-absolute", weights, index("/dev/zero")),
        model("index-of-nothing", weights, index("x.safetensors")),
        model("index-of-a-pickle", weights, index("pytorch_model.bin")),
        model("pickle-alone", weights, pickled(False)),
        model("pickle-beside", weights, pickled(True), "harmless"),
    ]
    out += [
        model(f"rank-{name}", config, edit(*low, "rank", to=value)) for name, value in RANKS.items()
    ]
    out += [
        model(f"config-{name}", config, damage)
        for name, damage in {
            "rank-wrong": edit(*low, "rank", to=6),
            "bias-text": edit(*low, "bias", to="yes"),
            "bias-absent": edit(*low, "bias", drop=True),
            "module-of-a-path": edit(
                "quantization_config", "modules", "../../x", to={"rank": 1, "bias": True}
            ),
            "module-of-the-whole": edit(
                "quantization_config", "modules", "", to={"rank": 1, "bias": True}
            ),
            "module-twice-deep": edit(
                "quantization_config", "modules", f"{QUERY}.up", to={"rank": 1, "bias": True}
            ),
            "modules-a-list": edit("quantization_config", "modules", to=[1]),
            "modules-gone": edit("quantization_config", "modules", to={}),
            "modules-100000": edit(
                "quantization_config",
                "modules",
                to={f"m{i}": {"rank": 1, "bias": True} for i in range(100_000)},
            ),
            "format-9": edit("quantization_config", "version", to=9),
            "format-true": edit("quantization_config", "version", to=True),
            "other-quantization": edit("quantization_config", "quant_method", to="gptq"),
            "quantization-text": edit("quantization_config", to="low_rank"),
            "layers-10^18": edit("num_hidden_layers", to=10**18),
            "layers-900": edit("num_hidden_layers", to=900),
            "layers-text": edit("num_hidden_layers", to="3"),
            "layers-0": edit("num_hidden_layers", to=0),
            "vocabulary-10^12": edit("vocab_size", to=10**12),
            "vocabulary-10^9": edit("vocab_size", to=10**9),
            "positions-10^9": edit("max_position_embeddings", to=10**9),
            "hidden-10^6": edit("hidden_size", to=10**6),
            "intermediate-10^9": edit("intermediate_size", to=10**9),
            "heads-0": edit("num_attention_heads", to=0),
            "heads-7": edit("num_attention_heads", to=7),
            "heads-negative": edit("num_attention_heads", to=-4),
            "labels-10^9": edit("num_labels", to=10**9),
            "labels-numbers": edit("id2label", to={"0": 1, "1": 2}),
            "labels-gap": edit("id2label", to={"0": "plain", "7": "coloured"}),
            "labels-list": edit("id2label", to=["plain", "coloured"]),
            "labels-surrogate": edit("id2label", to={"0": "plain", "1": "\ud800"}),
            "labels-path": edit("id2label", to={"0": "plain", "1": "../../../etc/x"}),
            "activation-unknown": edit("hidden_act", to="no_such"),
            "activation-code": edit("hidden_act", to="__import__('os').system('touch CANARY')"),
            "epsilon-nan": edit("layer_norm_eps", to=float("nan")),
            "epsilon-text": edit("layer_norm_eps", to="small"),
            "type-unknown": edit("model_type", to="no_such_type"),
            "type-path": edit("model_type", to="../../x"),
            "type-list": edit("model_type", to=["bert"]),
            "type-t5": edit("model_type", to="t5"),
            "architectures-number": edit("architectures", to=[3]),
            "attention-from-a-hub": edit("attn_implementation", to="evil/kernel"),
            "attention-table": edit("attn_implementation", to={"": "evil/kernel"}),
            "weights-elsewhere": edit("transformers_weights", to="../elsewhere.safetensors"),
            "dtype-unknown": edit("dtype", to="float7"),
        }.items()
    ]
    out += [
        model("remote-code", config, canary, "harmless"),
        model(
            "remote-code-of-unknown-type",
            config,
            lambda path, draw: (canary(path, draw), edit("model_type", to="evil")(path, draw)),
        ),
        model(
            "remote-code-of-the-tokenizer",
            settings,
            lambda path, draw: (
                canary(path, draw),
                edit("tokenizer_class", to="EvilTokenizer")(path, draw),
            ),
            "either",
        ),
        model(
            "adapter",
            config,
            lambda path, draw: (path.parent / "adapter_config.json").write_text(
                '{"peft_type": "LORA", "base_model_name_or_path": "../elsewhere"}'
            ),
        ),
        model(
            "a-pipe-among-the-files",
            config,
            lambda path, draw: os.mkfifo(path.parent / "vocab.txt"),
        ),
    ]
    out += [
        model(f"tokenizer-{name}", file, damage, expect)
        for name, (file, damage, expect) in {
            "ids-beyond": (words, tokenizer_ids, "refused"),
            "vocabulary-beyond": (words, edit("model", "vocab", "cat", to=10**6), "refused"),
            "no-unknown": (words, edit("model", "vocab", "[UNK]", drop=True), "either"),
            "other-model": (words, edit("model", "type", to="NoSuch"), "refused"),
            "padding-10^12": (
                words,
                edit(
                    "padding",
                    to={
                        "strategy": {"Fixed": 10**12},
                        "direction": "Right",
                        "pad_to_multiple_of": None,
                        "pad_id": 0,
                        "pad_type_id": 0,
                        "pad_token": "[PAD]",
                    },
                ),
                "either",
            ),
            "no-padding": (settings, edit("pad_token", to=None), "refused"),
            "inputs-foreign": (
                settings,
                edit("model_input_names", to=["input_ids", "attention_mask", "evil"]),
                "either",
            ),
            "inputs-without-mask": (
                settings,
                edit("model_input_names", to=["input_ids"]),
                "refused",
            ),
            "length-text": (settings, edit("model_max_length", to="long"), "refused"),
            "length-negative": (settings, edit("model_max_length", to=-5), "refused"),
            "length-10^30": (settings, edit("model_max_length", to=10**30), "harmless"),
            "class-path": (settings, edit("tokenizer_class", to="../../x"), "either"),
            "class-code": (settings, edit("tokenizer_class", to="os.system"), "either"),
        }.items()
    ]
    return out
