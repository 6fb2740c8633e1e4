"""Calibration, and a step of feature distillation: the student by each backend, in mixed precision."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter

import numpy as np
import torch
from torch import nn

import lowrank_kernels as lk
from benchmarks.encoders import inputs_of
from bert_decomp.distillation.features import FeatureCapture, Masks
from bert_decomp.distillation.losses import DistillationConfig
from bert_decomp.distillation.terms import FEATURE_TERMS, feature_losses, feature_sizes
from bert_decomp.evaluation.latency import take_turns
from lowrank_kernels import calibration, tuning

from .models import models_of, units_of
from .results import Setting

POINT = "32x128"


def run_calibration(setting: Setting) -> None:
    """Calibrate this GPU for the encoders' matrices and the units', as ``fuse_`` does for a user; a line for each."""
    os.environ[calibration.ENVIRONMENT] = "1"
    for name, make in (("matrices", models_of), ("units", units_of)):
        begin = time.time()
        make(setting)
        found: dict[str, object] = {"seconds": time.time() - begin}
        if torch.cuda.is_available():
            entries = tuning.measured(tuning.calibration_file(tuning.gpu(0)))
            found["entries"] = len(entries)
            for column in tuning.COLUMNS:
                winners = Counter(entry[column]["backend"] for entry in entries.values())
                found[column] = dict(winners)
        setting.results.add(f"calibration/{name}", **found)


def _step(student: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor]):
    """One step of distillation by the paper's terms, as a function without arguments."""
    config = DistillationConfig().without_labels()
    of_student, of_teacher = (FeatureCapture(m, config.features) for m in (student, teacher))
    shares = {
        name: weight.of_layers(teacher.config.num_hidden_layers)
        for name, weight in config.weights.items()
        if name in FEATURE_TERMS
    }
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-6)
    masks = Masks(inputs["attention_mask"], teacher.config)
    device = inputs["input_ids"].device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = student(**inputs).logits
            with torch.no_grad():
                known = teacher(**inputs).logits
            of_both = of_student.take(), of_teacher.take()
            sizes = feature_sizes([(of_both[1], masks)], shares)
            losses = feature_losses(*of_both, masks, shares, sizes)
            loss = sum(losses.values(), start=(logits - known).float().square().mean())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def run(setting: Setting) -> None:
    """Time a step by library matmuls and by the Triton operators, in float32 with bfloat16 autocast: a line a size."""
    known = setting.results.known()
    cuda, toy = torch.cuda.is_available(), setting.seconds == 0
    torch.manual_seed(0)
    models, _, _ = models_of(setting, torch.float32)
    teacher, sizes = models["dense", "dense"], [size for size, form in models if form == "unfused"]
    point = setting.points[0] if toy else POINT
    inputs, tokens = inputs_of(point, teacher.config.vocab_size, next(teacher.parameters()).device)
    for size in sizes:
        key = f"training/{size}"
        if key in known or setting.late(3):
            continue
        calls = {
            name: _step(copy.deepcopy(models[size, "unfused"]).train(), teacher, inputs)
            for name in ("torch", "triton")
        }
        times = take_turns(
            calls,
            0.0 if toy else 1.0,
            cuda=cuda,
            least=1 if toy else 5,
            warm=0 if toy else 3,
            within=lk.use_backend,
        )
        rows = {name: float(np.median(values)) * 1e3 for name, values in times.items()}
        setting.results.add(key, point=point, tokens=tokens, ms=rows)
