"""What a user's call takes: batches with their masks, eager and by ``fuse_(model, graphs="auto")``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.encoders import inputs_of
from bert_decomp.evaluation.latency import take_turns
from bert_decomp.runtime import fuse_

from .models import models_by_plan, placed
from .results import Setting, relative_error

POINTS = ("1x32", "8xmix", "32xmix", "32x128")
KINDS = ("structured 0.25", "mixed 0.25", "structured 0.125")


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure BERT-base's shape, dense and by plans of units, until it is late."""
    cuda, toy = torch.cuda.is_available(), setting.seconds == 0
    known = setting.results.known()
    points = setting.points if toy else POINTS
    for name, model in models_by_plan(setting).items():
        todo = [point for point in points if f"graphs/{point}/{name}" not in known]
        if name not in ("dense", *KINDS) or not todo:
            continue
        if setting.late(5):
            return
        model = placed(setting, model)
        forms: dict[str, nn.Module] = {
            "unfused, eager": model,
            "fused runtime, eager": fuse_(copy.deepcopy(model)),
        }
        if cuda:
            forms["fused runtime, graphs"] = fuse_(copy.deepcopy(model), graphs="auto")
        for point in todo:
            inputs, tokens = inputs_of(point, model.config.vocab_size, model.device.type)
            calls: dict[str, Callable[[], object]] = {
                form: partial(module, **inputs) for form, module in forms.items()
            }
            right = model(**inputs).logits.float()
            off = {
                form: relative_error(module(**inputs).logits.float(), right)
                for form, module in forms.items()
                if module is not model
            }
            limits = (0.0, 1) if toy else (0.3, 20)
            times = take_turns(calls, limits[0], cuda=cuda, least=limits[1], warm=0 if toy else 3)
            medians = {form: float(np.median(found)) * 1e3 for form, found in times.items()}
            setting.results.add(f"graphs/{point}/{name}", tokens=tokens, ms=medians, logits_off=off)
