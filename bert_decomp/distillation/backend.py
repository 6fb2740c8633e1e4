"""Which operators a student trains with on a GPU: the fused ones with their gradients, or library matmuls.

In training a fused operator goes through autograd, which costs the host more than a small kernel runs, so what is the
faster one at inference need not be it here. Therefore the kernels are calibrated for the student's matrices, forward
and backward, and then whole steps are timed both ways.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lowrank_kernels import LowRankLinear, dispatch, use_backend
from lowrank_kernels.calibration import calibrate
from lowrank_kernels.problem import Problem

from ..evaluation.latency import take_turns

logger = logging.getLogger("bert_decomp")

LIBRARY = "torch"
# Gradients that differ by more than this share are those of another operator.
TOLERANCE = 0.1
SECONDS = 0.5


def training_problems(model: torch.nn.Module, dtype: torch.dtype) -> list[Problem]:
    """The factored layers of a model and their gradients, which are the same operator with the factors swapped."""
    result = []
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            inner, outer = layer.in_features, layer.out_features
            for sizes in ((inner, outer), (outer, inner)):
                result.append(Problem("linear", 0, *sizes, layer.rank, dtype))
    return result


def _gradients(
    model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Gradients of the mean square of the answers for the factored layers' parameters."""
    device = model.device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(**batch)[0].float().square().mean()
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


def faster_backend(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = ("auto", LIBRARY),
) -> str:
    """The backend by which a training step of ``model`` is faster, of those whose gradients are right.

    It is ``LIBRARY`` where no layer has two factors of one rank, as in models of smaller heads alone and nested ones.

    Args:
        model: on its device, in evaluation mode, so that steps can be compared.
        batch: inputs without labels.
        dtype: of autocast; float32 for none.
        names: backends to compare, ``LIBRARY`` among them; "auto" leaves each call to what was measured.
    """
    problems = training_problems(model, dtype)
    if not problems:
        return LIBRARY
    calibrate(problems, model.device)
    right: list[Tensor] = []
    with use_backend(LIBRARY):
        right = _gradients(model, batch, dtype)
    scale = torch.stack([gradient.norm() for gradient in right]).norm()
    kept = []
    for name in names:
        with use_backend(name):
            mine = _gradients(model, batch, dtype)
        differences = [(a - b).norm() for a, b in zip(mine, right, strict=True)]
        off = (torch.stack(differences).norm() / scale).item()
        if off <= TOLERANCE:
            kept.append(name)
        else:
            logger.warning(
                "training: gradients by backend %s are off by %.2g, so it is not used", name, off
            )
    times = take_turns(
        {name: lambda: _gradients(model, batch, dtype) for name in kept},
        SECONDS,
        cuda=model.device.type == "cuda",
        within=use_backend,
    )
    medians = {name: float(np.median(values)) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    logger.info(
        "training: backend %s (%s)",
        best,
        ", ".join(f"{name} {1e3 * median:.1f} ms a step" for name, median in medians.items()),
    )
    return best


def training_backend(
    student: PreTrainedModel,
    training: TrainingArguments,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The backend that trains ``student`` the faster: on a GPU measured on the first examples, elsewhere ``LIBRARY``.

    One that was asked for by name stays.
    """
    if dispatch.override() != "auto":
        return dispatch.override()
    if training.device.type != "cuda" or not len(train):
        return LIBRARY
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    first = train.select(range(min(len(train), training.per_device_train_batch_size)))
    names = [name for name in tokenizer.model_input_names if name in train.column_names]
    batch = tokenizer.pad(first.select_columns(names)[:], return_tensors="pt")
    student.to(training.device).eval()
    return faster_backend(student, dict(batch.to(training.device)), dtype)
