"""Export a saved classifier, low-rank or dense, to ONNX or a ``torch.export`` program.

Batch and length stay dynamic. What was written is loaded again and must give torch's logits on real text, in batches of
one and of three sentences, before it takes the place of an older file. ONNX is made by torch's exporter from the graph
that ``torch.export`` traces: both formats then share one tracing, which handles the masks and the dynamic sizes of every
family that the tests cover.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kernels import use_backend

from ..errors import UserError
from ..io.atomic import atomic_file
from ..models.replacement import Replacement

SENTENCES = (
    "What is the capital of the country that won the first world cup?",
    "Who wrote it?",
    "The film is slow at first, then it finds its voice and never lets go.",
    "How far is it from Rome to Paris?",
    "No.",
    "A quarter of the weights, they say, is enough for most of what a model has to know.",
    "Why do birds sing?",
)
# Largest difference of logits from torch's, relative to the largest logit: a dozen layers of float32 sums in another order.
TOLERANCE = 1e-4
# A protobuf message, and so an ONNX file with its weights inside, cannot be larger.
ONNX_LIMIT = 2 * 2**30

Logits = Callable[[dict[str, Tensor]], Tensor]


class _Classifier(nn.Module):
    """A classifier as a function of tensors: inputs in the order of ``names``, logits out."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs))).logits


@contextmanager
def _quietly():
    """Without the exporters' progress and advice, which mean nothing to who exports."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")
    ]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before):
                logger.setLevel(level)


def _trace(
    model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]
) -> torch.export.ExportedProgram:
    dynamic = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim.DYNAMIC}
    inputs = tuple(batch[name] for name in names)
    try:
        with torch.no_grad(), use_backend("torch"), _quietly():
            return torch.export.export(
                _Classifier(model, names).eval(), inputs, dynamic_shapes=((dynamic,) * len(inputs),)
            )
    except Exception as error:  # whatever tracing a foreign architecture runs into
        raise UserError(
            f"{type(model).__name__} cannot be exported with dynamic batch and length: "
            f"{(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error


def _write_onnx(program: torch.export.ExportedProgram, names: list[str], path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise UserError(
            f"the weights are {size / 2**30:.1f} GiB and one ONNX file holds less than 2; "
            "export it in the format torch-export"
        )
    with _quietly():
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["logits"], verbose=False
        )
        onnx.save(str(path), external_data=False)


def onnx_session(path: Path, threads: int = 1) -> Logits:
    """An ONNX file as a function of a batch, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda batch: torch.from_numpy(
        session.run(None, {name: batch[name].numpy() for name in names})[0]
    )


def _write_program(program: torch.export.ExportedProgram, names: list[str], path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _load_program(path: Path) -> Logits:
    with path.open("rb") as file:
        program = torch.export.load(file)
    module, count = program.module(), len(program.graph_signature.user_inputs)
    return lambda batch: module(*list(batch.values())[:count])


@dataclass(frozen=True)
class Format:
    """A file format: its ending, the packages it needs, how a traced program is written, and read back as a function."""

    suffix: str
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, list[str], Path], None]
    load: Callable[[Path], Logits]
    quantisable: bool = False


FORMATS = {
    "onnx": Format(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, onnx_session, quantisable=True
    ),
    "torch-export": Format(".pt2", (), _write_program, _load_program),
}


def quantise(source: Path, path: Path) -> None:
    """int8 weights, and activations quantised as they come, by onnxruntime's own tool."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quietly():
        # Transposed weights become plain ones first; the tool passes by a matmul whose weight is computed.
        plain = Path(folder) / "plain.onnx"
        quant_pre_process(str(source), str(plain), skip_symbolic_shape=True)
        # Seven bits of the eight: a CPU without VNNI adds pairs of products in 16 bits, where eight overflow. With eight,
        # a low-rank model that had 94.5 % of its answers right had 21 % on such a CPU.
        quantize_dynamic(str(plain), str(path), per_channel=True, reduce_range=True)


def check_batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, names: list[str]
) -> list[dict[str, Tensor]]:
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
def difference(
    run: Logits, model: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """The largest difference from ``model``'s logits, relative to their largest, and the share of equal decisions."""
    pairs = [(run(batch), model(**batch).logits) for batch in batches]
    found, wanted = (torch.cat([pair[index].flatten(0, -2) for pair in pairs]) for index in (0, 1))
    same = (
        1.0
        if wanted.shape[-1] == 1
        else (found.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    )
    return ((found - wanted).abs().max() / wanted.abs().max()).item(), same


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest input in tokens that model and tokenizer take."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa's and MPNet's positions start after padding's, so two entries of their tables stand for no token.
    return min(positions - 2, tokenizer.model_max_length)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    format: str = "onnx",
    *,
    int8: bool = False,
    texts: list[str] | None = None,
) -> tuple[float, float]:
    """Write ``model`` to ``path``, checked against torch, whole or not at all.

    Args:
        model: a sequence classifier on the CPU, dense or low-rank, not fused.
        format: a key of ``FORMATS``.
        int8: quantise what was exported, dynamically.
        texts: what to check on; ``SENTENCES`` if None.

    Returns:
        The largest relative difference of logits from torch's, and the share of texts with the same decision.

    Raises:
        UserError: a package is missing, the mix is not supported, or the exported model differs from torch's.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if int8 and not chosen.quantisable:
        raise UserError(f"int8 is not for {format}; use onnx")
    missing = [name for name in chosen.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{format} needs {' and '.join(missing)}; pip install 'lowrank-bert[export]'"
        )
    if any(isinstance(module, Replacement) for module in model.modules()):
        raise UserError("a fused model cannot be exported; unfuse_ it first")
    if next(model.parameters()).device.type != "cpu":
        raise UserError("export works on the CPU; move the model there with .cpu()")
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in accepted]
    batches = check_batches(
        tokenizer, list(texts or SENTENCES), length_limit(model, tokenizer), names
    )
    model.eval()
    # Traced on the last of the largest batches: sizes of 1 would be taken for constants.
    program = _trace(model, names, max(batches, key=lambda batch: batch["input_ids"].shape[0]))
    with atomic_file(path) as temporary:
        if int8:
            with tempfile.TemporaryDirectory() as folder:
                chosen.write(program, names, whole := Path(folder) / "whole")
                quantise(whole, temporary)
        else:
            chosen.write(program, names, temporary)
        worst, same = difference(chosen.load(temporary), model, batches)
        if not np.isfinite(worst) or (worst > TOLERANCE and not int8):
            raise UserError(
                f"the exported model's logits are {worst:.1e} of the largest away from torch's; "
                "nothing was written"
            )
    return worst, same
