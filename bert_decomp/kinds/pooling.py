"""From token vectors to one vector a text, as the files of a sentence-transformers folder say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..io.json import read_json

MODULES, POOLING = "modules.json", "1_Pooling"
# Names of sentence-transformers before version 6, where each mode had a flag.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = ("cls", "mean", "max")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one.

    Attributes:
        modes: of ``MODES``; the results of several stand one after another.
        normalise: to length 1.
        max_length: tokens to which texts are cut; None for as many as the model takes.
        prompt: what is put before every text.

    Example:
        >>> hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]])
        >>> Pooling()(hidden, torch.tensor([[1, 1, 0]]))
        tensor([[2., 4.]])
    """

    modes: tuple[str, ...] = ("mean",)
    normalise: bool = False
    max_length: int | None = None
    prompt: str = ""

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, width) and a mask (batch, length), 1 for real tokens -> (batch, width * modes)."""
        pooled = torch.cat([_POOL[mode](hidden, mask) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


_POOL = {"cls": lambda hidden, mask: hidden[:, 0], "mean": _mean, "max": _max}


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; save it again with sentence-transformers")
    return values


def read_pooling(folder: str | Path) -> Pooling | None:
    """How the encoder in a sentence-transformers folder pools; None for a folder without ``modules.json``.

    Raises:
        UserError: the folder has modules after the encoder that are not computed here, or is damaged.
    """
    folder = Path(folder)
    if not (folder / MODULES).is_file():
        return None
    entries = read_json(folder / MODULES)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("type"), str)
        and isinstance(entry.get("path"), str)
        for entry in entries
    ):
        raise UserError(f"{folder / MODULES} is no list of modules; save it again")
    kinds = [entry["type"].rpartition(".")[2] for entry in entries]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder} has the modules {', '.join(kinds)}; only Transformer, Pooling and Normalize are computed here"
        )
    place = Path(entries[1]["path"])
    if entries[0]["path"] not in ("", ".") or place.is_absolute() or ".." in place.parts:
        raise UserError(f"{folder / MODULES} names modules outside of the folder; save it again")
    pooling, settings = (
        _read(folder / place / "config.json"),
        _read(folder / "config_sentence_transformers.json"),
    )
    modes = pooling.get(
        "pooling_mode", [mode for flag, mode in _FLAGS.items() if pooling.get(flag)]
    )
    modes = (modes,) if isinstance(modes, str) else tuple(modes or ("mean",))
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong:
        raise UserError(
            f"{folder} pools by {wrong[0]!r}; only {', '.join(MODES)} are computed here"
        )
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    prompt = prompts.get(name, "") if name else ""
    if prompt and pooling.get("include_prompt") is False:
        raise UserError(f"{folder} pools without its prompt, which is not computed here")
    limit = _read(folder / "sentence_bert_config.json").get("max_seq_length")
    return Pooling(
        modes, "Normalize" in kinds, limit if isinstance(limit, int) else None, str(prompt)
    )
