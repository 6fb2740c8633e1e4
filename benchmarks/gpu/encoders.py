"""Whole encoders: compressed models by each backend against the strongest dense rivals, eager, captured and compiled.

A batch without padding is given no mask, so that attention keeps its flash kernel in every mode; dense and low-rank are
then rivals in one table: eager, replayed from a CUDA graph, and compiled by Inductor and replayed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import masking_utils

import lowrank_kernels as lk
from benchmarks import bert
from benchmarks.encoders import inputs_of
from bert_decomp.evaluation.latency import take_turns
from lowrank_kernels.backends import get_backend

from .models import models_of, units_of
from .results import Setting, relative_error

# Points whose graphs are profiled, kernel by kernel.
PROFILED = ("32x128",)
# Seconds that compiling one model takes, about.
COMPILING = 40.0


class Form(NamedTuple):
    """A model in the table: its size, its form, and the backend that its factored layers are told to use."""

    size: str
    form: str
    backend: str | None

    def within(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.backend is None else lk.use_backend(self.backend)


def _forms(sizes: Sequence[str], backends: Sequence[str]) -> list[Form]:
    result = [Form("dense", "dense", None)]
    result += [Form("dense", "fused runtime", backend) for backend in backends]
    for size in sizes:
        result.append(Form(size, "unfused", "torch"))
        result += [Form(size, "fused runtime", backend) for backend in backends]
    return result


def _compile_ahead(forms: list[Form], models: dict, inputs: dict) -> None:
    """Compile each form's kernels together: one after another they would take most of a stage."""
    for form in forms:
        known = form.backend not in (None, "auto")
        ahead = get_backend(form.backend).compile_ahead if known else None
        if ahead is not None:
            with form.within(), ahead():
                models[form.size, form.form](**inputs)


@contextmanager
def _without_made_masks() -> Iterator[None]:
    """Where a graph is recorded or compiled, transformers would make a mask of ones of no mask, and lose the flash
    kernel by it: the dense rivals are spared that."""
    before = masking_utils._ignore_bidirectional_mask_sdpa

    def ignore(padding_mask: Any, *rest: Any, **keywords: Any) -> bool:
        return padding_mask is None or before(padding_mask, *rest, **keywords)

    with mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", ignore):
        yield


def _warm_up(seconds: float = 0.5) -> None:
    """Keep the GPU busy until its clock is up."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin = time.time()
    while time.time() - begin < seconds:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def _kernels(replay: Callable[[], object], repetitions: int = 10) -> dict[str, list[float]]:
    """Microseconds and launches of each kernel in a replay, the longest first."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        for _ in range(repetitions):
            replay()
        torch.cuda.synchronize()
    found = {
        event.key[:100]: [event.self_device_time_total / repetitions, event.count / repetitions]
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:16])


def _measure_point(
    setting: Setting, point: str, forms: list[Form], models: dict, twins: dict, compiled: bool
) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    dense = models["dense", "dense"]
    inputs, tokens = inputs_of(point, dense.config.vocab_size, "cuda" if cuda else "cpu")
    full = bool(inputs["attention_mask"].all())
    if full:
        del inputs["attention_mask"]
    calls: dict[str, Callable[[], object]] = {}
    within: dict[str, Form] = {}
    logits: dict[Form, torch.Tensor] = {}
    failed: dict[str, str] = {}

    def add(form: Form, mode: str, make: Callable[[], Callable[[], object]]) -> None:
        name = ", ".join([*(part for part in form if part), mode])
        try:
            with form.within():
                calls[name] = make()
            within[name] = form
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]

    if cuda:
        _compile_ahead(forms, models, inputs)
    for form in forms:
        model = models[form.size, form.form]
        # What drops padding cannot be captured: how much there is decides the shapes.
        twin = twins.get((form.size, form.form), model)
        add(
            form, "eager", lambda m=twin if full else model: bert.prepare(m, "eager", inputs, "")[0]
        )
        if cuda:
            add(form, "graph", lambda m=twin: bert.graphed(m, inputs))
        with form.within():
            logits[form] = (twin if full else model)(**inputs).logits.float()
    toy = setting.seconds == 0
    if cuda and compiled:
        _warm_up()
        for form in (f for f in forms if f.form in ("dense", "unfused")):
            if setting.late(COMPILING):
                break
            torch.compiler.reset()
            begin, before = time.time(), set(calls)
            fast = torch.compile(models[form.size, form.form], dynamic=False)
            add(form, "compiled, graph", lambda m=fast: bert.graphed(m, inputs))
            # At once, because the next one takes long: beside the same form as it is in a graph.
            new = {name: calls[name] for name in calls if name not in before}
            new |= {name: call for name, call in calls.items() if within[name] == form}
            alone = take_turns(new, 0.25, cuda=True)
            milliseconds = {name: float(np.median(values)) * 1e3 for name, values in alone.items()}
            key = f"compiling/{point}/{form.size}, {form.form}"
            setting.results.add(key, seconds=time.time() - begin, ms=milliseconds)
    if cuda:
        _warm_up()

    @contextmanager
    def turn(name: str) -> Iterator[None]:
        """Another backend voids what was prepared, so the first call of a turn prepares it again, untimed."""
        with within[name].within():
            if within[name].backend is not None:
                calls[name]()
            yield

    times = take_turns(
        calls,
        0.0 if toy else 0.25,
        cuda=cuda,
        least=1 if toy else 5,
        warm=0 if toy else 1,
        within=turn,
    )
    kernels = {}
    if cuda and point in PROFILED:
        names = [name for name in calls if name.endswith("graph") and "compiled" not in name]
        kernels = {name: _kernels(calls[name]) for name in names}
    medians = {name: float(np.median(values)) for name, values in times.items()}
    best = min(median for name, median in medians.items() if within[name].size == "dense")
    rows = {
        name: {
            "ms": median * 1e3,
            "p95_ms": float(np.quantile(times[name], 0.95)) * 1e3,
            "over_best_dense": best / median,
        }
        for name, median in medians.items()
    }
    return {
        "tokens": tokens,
        "rows": rows,
        "failed": failed,
        "kernels": kernels,
        "logits_off": _logits_off(logits),
    }


def _logits_off(logits: dict[Form, torch.Tensor]) -> dict[str, float]:
    """How far each fused form's logits are from its unfused model's, relative."""
    result = {}
    for form, values in logits.items():
        plain = Form("dense", "dense", None)
        right = logits[plain if form.size == "dense" else Form(form.size, "unfused", "torch")]
        if values is not right:
            result[", ".join(part for part in form if part)] = relative_error(values, right)
    return result


def _run(
    setting: Setting,
    label: str,
    backends: Sequence[str],
    points: Sequence[str],
    make: Callable[[Setting], tuple[dict, dict, dict[str, float]]] = models_of,
    compiled: bool = False,
) -> None:
    torch.set_num_threads(1)
    known = setting.results.known()
    todo = [point for point in points if f"{label}/{point}" not in known]
    if not todo:
        return
    models, twins, limits = make(setting)
    setting.results.add(f"{label}/limits", **limits)
    for point in todo:
        if setting.late():
            return
        forms = _forms(list(limits), backends)
        with _without_made_masks():
            found = _measure_point(setting, point, forms, models, twins, compiled)
        setting.results.add(f"{label}/{point}", **found)
        gc.collect()


@torch.inference_mode()
def run(setting: Setting) -> None:
    """Measure the points that are not known yet, until it is late."""
    _run(setting, "encoder", ("torch", "triton"), setting.points)


@torch.inference_mode()
def run_compiled(setting: Setting) -> None:
    """Units at some of the points with compiled rivals beside."""
    _run(setting, "compiled", ("torch", "auto"), setting.compiled, units_of, compiled=True)


@torch.inference_mode()
def run_by_table(setting: Setting) -> None:
    """The same models, each call served by what calibration measured."""
    _run(setting, "by table", ("auto",), setting.points)


@torch.inference_mode()
def run_units(setting: Setting) -> None:
    """Structured and mixed plans of units, served by library calls and by what calibration measured."""
    _run(setting, "units", ("torch", "auto"), setting.points, units_of)
