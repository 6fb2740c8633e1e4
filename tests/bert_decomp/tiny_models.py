"""Small random encoders of every family, batches for them, and labelled sentences."""

from __future__ import annotations

import copy
import csv
import random
from functools import wraps

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

COLOURS, ANIMALS = ("red", "green", "blue", "grey"), ("cat", "dog", "owl", "hen", "cow")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "a", "is", "sees", *COLOURS, *ANIMALS]

# Odd sizes on purpose: 4 heads of 9, an intermediate size that is no multiple of 8.
_SIZES = {
    "hidden_size": 36,
    "intermediate_size": 57,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
FAMILY_SIZES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"), _SIZES),
    "distilbert": {
        "dim": 36,
        "hidden_dim": 57,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 40,
        "num_labels": 3,
    },
    "modernbert": {
        **_SIZES,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
    },
}


def made_once(make):
    """``make``, which makes a model, with its results kept: a call gives a copy, which takes a third of the time or
    less, and leaves the generator in the state in which making it does."""
    kept = {}

    @wraps(make)
    def copied(*arguments, **options):
        key = repr((arguments, sorted(options.items())))
        if key not in kept:
            kept[key] = make(*arguments, **options), torch.get_rng_state()
        made, state = kept[key]
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return copied


@made_once
def tiny_model(family: str, **changes):
    """A random classifier whose weights are large enough that every part matters."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**FAMILY_SIZES[family], **changes})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def tiny_tokenizer():
    """A real tokenizer over WORDS."""
    core = Tokenizer(
        WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=40,
    )


def tiny_batch(rows: int = 5, length: int = 11, labels: int = 3):
    """Right-padded batch of different lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {
        "input_ids": torch.where(mask.bool(), ids, torch.full_like(ids, 1)),
        "attention_mask": mask,
        "labels": torch.arange(rows) % labels,
    }


def write_csv(path, rows: int, seed: int = 0):
    """Sentences whose label is whether they name a colour, as a CSV file with columns sentence and label."""
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for _ in range(rows):
            coloured = draw.random() < 0.5
            words = [
                "the",
                *([draw.choice(COLOURS)] if coloured else []),
                draw.choice(ANIMALS),
                "sees",
                "a",
                draw.choice(ANIMALS),
            ]
            writer.writerow([" ".join(words), "coloured" if coloured else "plain"])
    return path
