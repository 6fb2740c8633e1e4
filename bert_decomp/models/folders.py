"""What a model's folder says of it before any weight is read: its config, its kind, its sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..data.demo import resolve_model
from ..errors import UserError
from ..kinds import EMBEDDING, REGRESSION, RERANKING, Kind, is_cross_encoder, kind_of_config
from ..kinds.pooling import MODULES
from .format import LowRankConfig
from .guards import check_folder, ignore_attention
from .weights import skeleton


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever a library raises over the untrusted files of ``what`` becomes one line, a UserError: which error it is
    depends on the damage."""
    try:
        yield
    except Exception as error:
        kind = (
            ""
            if isinstance(error, (UserError, OSError, ValueError))
            else f"{type(error).__name__}: "
        )
        raise UserError(f"cannot load {what}: {kind}{_first_line(error)}") from error


def load_config(name_or_path: str, **config_changes: Any) -> Any:
    """Read a model's config.

    Args:
        config_changes: values that replace the config's (``num_labels``, ``id2label`` ...).

    Raises:
        UserError: there is no such model, or its config is unreadable or asks for what is never done (see ``guards``).
    """
    path = resolve_model(name_or_path)
    with one_line(name_or_path):
        check_folder(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **config_changes)
        ignore_attention(config, name_or_path)
    if config_changes.get("encoder_fraction") is not None and not hasattr(
        config, "encoder_fraction"
    ):
        raise UserError(f"{name_or_path} has one size only; leave encoder_fraction out")
    return config


def is_int8(name_or_path: str) -> bool:
    """Whether a folder holds a model that was saved in int8.

    Raises:
        UserError: there is no such model.
    """
    entry = getattr(load_config(name_or_path), "quantization_config", None) or {}
    return entry.get("int8") is not None


def nested_fractions(name_or_path: str) -> tuple[float, ...]:
    """The encoder fractions that a nested folder serves, falling; none if it has one size.

    Raises:
        UserError: there is no such model.
    """
    entry = getattr(load_config(name_or_path), "quantization_config", None)
    return () if entry is None else LowRankConfig.from_dict(entry).fractions


def load_skeleton(name_or_path: str, kind: Kind) -> PreTrainedModel:
    """The model of a kind that a folder's config describes, without its weights: every tensor is on ``meta``.

    Raises:
        UserError: there is no such model, or its config describes none.
    """
    config = load_config(name_or_path)
    with one_line(name_or_path):
        return skeleton(config, kind)


def kind_of_folder(name_or_path: str) -> Kind | None:
    """The kind that a folder's model was trained for; None for a bare encoder of which no file says how it pools.

    Raises:
        UserError: there is no such model.
    """
    found, folder = kind_of_config(load_config(name_or_path)), Path(resolve_model(name_or_path))
    if found is None and (folder / MODULES).is_file():
        return EMBEDDING
    return RERANKING if found is REGRESSION and is_cross_encoder(folder) else found


def trained_kind(name_or_path: str) -> Kind:
    """The kind of task that a checkpoint was trained for.

    Raises:
        UserError: it is of none, and a new head would answer at random.
    """
    kind = kind_of_folder(name_or_path)
    if kind is None:
        config = load_config(name_or_path)
        saved_from = " and ".join(config.architectures or ["no architecture"])
        raise UserError(
            f"{name_or_path} is not a fine-tuned classifier (its config names {saved_from}), and a new head would "
            "answer at random; give the folder of one, such as a run's model"
        )
    return kind


def fingerprint_of_checkpoint(name_or_path: str) -> str:
    """A digest of every configuration and weight file of a checkpoint folder (of the name alone, if it is a hub's)."""
    folder = Path(resolve_model(name_or_path))
    digest = hashlib.sha256(str(name_or_path).encode() if not folder.is_dir() else b"")
    for file in (
        sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors"))
        if folder.is_dir()
        else []
    ):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
