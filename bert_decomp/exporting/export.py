"""Export a saved classifier, low-rank or dense, to ONNX, OpenVINO, a ``torch.export`` program or the int8 runtime.

Batch and length stay dynamic. What was written is loaded again and must give torch's logits on real text, in batches of
one and of three sentences, before it takes the place of an older file. Every format but the last starts from the graph
that ``torch.export`` traces: they share one tracing, which handles the masks and the dynamic sizes of every family that
the tests cover.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kernels import use_backend

from ..errors import UserError
from ..io.atomic import allow_umask, atomic_file, atomic_folder, remove, sync
from ..io.json import read_json, write_json
from ..kinds import KINDS, kind_of
from ..models.format import refuse_fused
from ..models.nested import refuse_several
from .formats import Batch, Format, Logits, find_format
from .onnx import DATA_SUFFIX
from .quiet import quietly

SENTENCES = (
    "What is the capital of the country that won the first world cup?",
    "Who wrote it?",
    "The film is slow at first, then it finds its voice and never lets go.",
    "How far is it from Rome to Paris?",
    "No.",
    "A quarter of the weights, they say, is enough for most of what a model has to know.",
    "Why do birds sing?",
)
# Largest difference of logits from torch's, relative to the largest logit: a dozen layers of float32 sums in another
# order.
TOLERANCE = 1e-4


class _Function(nn.Module):
    """A model as a function of tensors: inputs in the order of ``names``, logits (or what its kind gives) out."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        super().__init__()
        self.model, self.names, self.outputs = model, names, kind_of(model).outputs

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        outputs = tuple(found[name] for name in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def trace(
    model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]
) -> torch.export.ExportedProgram:
    """The model as a program with dynamic batch and length, from inputs ``names`` to logits, traced on ``batch``.

    Raises:
        UserError: the architecture cannot be traced so.
    """
    dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim.DYNAMIC}
    inputs = tuple(batch[name] for name in names)
    try:
        with torch.no_grad(), use_backend("torch"), quietly():
            return torch.export.export(
                _Function(model, names).eval(), inputs, dynamic_shapes=((dynamic,) * len(inputs),)
            )
    except Exception as error:  # whatever tracing a foreign architecture runs into
        raise UserError(
            f"{type(model).__name__} cannot be exported with dynamic batch and length: "
            f"{(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error


def check_batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, names: list[str]
) -> list[Batch]:
    """The texts one by one, and three at a time with padding, as token ids in the order of ``names``.

    Raises:
        UserError: the tokenizer cannot pad.
    """
    groups = [[text] for text in texts] + [
        texts[start : start + 3] for start in range(0, len(texts), 3)
    ]
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no padding token; set one and save it again")
    encoded = [
        tokenizer(group, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        for group in groups
    ]
    return [{name: batch[name] for name in names} for batch in encoded]


@torch.no_grad()
def difference(run: Logits, model: PreTrainedModel, batches: list[Batch]) -> tuple[float, float]:
    """The largest difference from ``model``'s logits, relative to their largest, and the share of equal decisions.

    Where every token has an answer or a vector, those of padding are nobody's, and engines differ in them.
    """
    kind = kind_of(model)

    def rows(values: Tensor, batch: Batch) -> Tensor:
        each = values.ndim == 2 or "attention_mask" not in batch
        return values.flatten(0, -2) if each else values[batch["attention_mask"].bool()]

    pairs = [(rows(run(batch), batch), rows(kind.raw(model(**batch)), batch)) for batch in batches]
    found, wanted = (torch.cat([pair[index] for pair in pairs]) for index in (0, 1))
    decided = [kind.decisions(answers) for answers in (found, wanted)]
    same = 1.0
    if decided[0] is not None and decided[1] is not None:
        same = (decided[0] == decided[1]).double().mean().item()
    return ((found - wanted).abs().max() / wanted.abs().max()).item(), same


@torch.no_grad()
def tolerance(model: PreTrainedModel, batches: list[Batch]) -> float:
    """How far an exported model's logits may be from ``model``'s, relative to their largest.

    In half precision: twice what the model's own are from those of the same weights in float32, and some roundings.
    """
    if model.dtype in (torch.float32, torch.float64):
        return TOLERANCE
    exact = copy.deepcopy(model).float()
    own, _ = difference(
        lambda batch: kind_of(model).raw(exact(**batch)).to(model.dtype), model, batches
    )
    return 2 * own + 4 * torch.finfo(model.dtype).eps


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest input in tokens that model and tokenizer take."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa's and MPNet's positions start after padding's, so two entries of their tables stand for no token.
    return min(positions - 2, tokenizer.model_max_length)


@contextmanager
def _destination(path: Path, chosen: Format) -> Iterator[Path]:
    """A temporary file, or a folder to fill, that takes the place of ``path`` in the end."""
    if not chosen.is_folder:
        with atomic_file(path) as temporary:
            yield temporary
        return
    with atomic_folder(path) as temporary:
        yield temporary
        # The old folder goes as one: it may be an older export, and nothing else.
        others = {file.name for file in path.glob("*")} - {
            file.name for file in temporary.iterdir()
        }
        if others:
            raise UserError(f"{path} holds other files ({min(others)}); choose another folder")


def _place_data(temporary: Path, path: Path, suffix: str) -> None:
    """Put weights that were written beside ``temporary`` beside ``path``, or remove those of an older file.

    The older file goes first: whenever the process is killed, no file stands beside weights that are not its own.
    """
    data, place = (one.with_name(one.name + suffix) for one in (temporary, path))
    if data.exists() or place.exists():
        remove(path)
    if data.exists():
        allow_umask(data, data.parent)
        sync(data)
        os.replace(data, place)
    else:
        remove(place)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    format: str = "onnx",
    *,
    int8: bool = False,
    texts: list[str] | None = None,
) -> tuple[float, float]:
    """Write ``model`` to ``path``, a file or a folder, checked against torch, completely or not at all.

    An ONNX model of 2 GiB or more has its weights beside it, in a file of the same name with ``.data`` after it.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1,
    ...     num_attention_heads=2, intermediate_size=48))
    >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    >>> path = Path(tempfile.mkdtemp()) / "model.pt2"
    >>> difference, same = export(model, tokenizer, path, "torch-export")
    >>> difference < 1e-4, same, path.is_file()
    (True, 1.0, True)

    Args:
        model: on the CPU, dense or low-rank, in float32 or half precision, not fused. A classifier gives logits, an
            embedder its token vectors, which other libraries pool.
        format: a key of ``formats.FORMATS``: onnx, optimum, openvino, torch-export, or fused (with ``int8``).
        int8: quantise weights and activations.
        texts: what to check on, and what an int8 model is calibrated on; ``SENTENCES`` if None. For ``fused`` a few
            hundred of the model's task.

    Returns:
        The largest relative difference of logits from torch's, and the share of texts with the same decision.

    Raises:
        UserError: a package is missing, the combination is not supported, the model is no sequence classifier, or the
        exported model differs from torch's.
    """
    chosen, path = find_format(format), Path(path)
    if chosen.of_model and not (int8 and texts):
        raise UserError(
            f"{format} is the int8 runtime's format, calibrated on text of the model's task; give int8 and texts"
        )
    if int8 and chosen.quantise is None and not chosen.of_model:
        raise UserError(f"int8 is not for {format}; use onnx or openvino")
    refuse_fused(model, "exported")
    refuse_several(model, "exported")
    if not any(kind.recognises(model.config, type(model).__name__) for kind in KINDS.values()):
        raise UserError(
            f"{type(model).__name__} is not a sequence classifier, and only logits of one are exported"
        )
    if next(model.parameters()).device.type != "cpu":
        raise UserError("export works on the CPU; move the model there with .cpu()")
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in accepted]
    batches = check_batches(
        tokenizer, list(texts or SENTENCES), length_limit(model, tokenizer), names
    )
    model.eval()
    is_half = model.dtype in (torch.float16, torch.bfloat16)
    traced = copy.deepcopy(model).float() if chosen.float32_only and is_half else model
    # Traced on the last of the largest batches: sizes of 1 would be taken for constants.
    largest = max(batches, key=lambda batch: batch["input_ids"].shape[0])
    program = None if chosen.of_model else trace(traced, names, largest)
    with _destination(path, chosen) as temporary:
        if chosen.is_folder:
            config = copy.deepcopy(model.config)
            # Other libraries know nothing of factored layers, and the exported graph needs nothing of them.
            config.__dict__.pop("quantization_config", None)
            config.save_pretrained(temporary)
            save_tokenizer(tokenizer, temporary)
            kind_of(model).save(model, temporary)
        if chosen.of_model:
            chosen.write(model, temporary, batches)
        elif int8 and chosen.quantise is not None:
            with tempfile.TemporaryDirectory() as folder:
                exact = Path(folder) if chosen.is_folder else Path(folder) / chosen.target
                chosen.write(program, names, exact, kind_of(model).outputs)
                chosen.quantise(exact, temporary, batches)
        else:
            chosen.write(program, names, temporary, kind_of(model).outputs)
        worst, same = difference(chosen.load(temporary), model, batches)
        if not np.isfinite(worst) or (not int8 and worst > tolerance(model, batches)):
            raise UserError(
                f"the exported model's logits are {worst:.1e} of the largest away from torch's; "
                "nothing was written"
            )
        if chosen.data_suffix is not None:
            _place_data(temporary, path, chosen.data_suffix)
    return worst, same


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under a class name that transformers 4 knows too: optimum-onnx needs that version."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})


def megabytes(path: Path) -> float:
    """Size of a model file and of its weights, where those are in a file beside it; or of all files in a folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("model.onnx", "model.onnx.data", "other.onnx"):
    ...     _ = (folder / name).write_bytes(bytes(500_000))
    >>> megabytes(folder / "model.onnx"), megabytes(folder)
    (1.0, 1.5)
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        # ONNX's external data, and the weights beside OpenVINO's description.
        beside = [path.with_name(path.name + DATA_SUFFIX)]
        beside += [path.with_suffix(".bin")] if path.suffix == ".xml" else []
        files = [path, *(file for file in beside if file.is_file())]
    return sum(file.stat().st_size for file in files) / 1e6
