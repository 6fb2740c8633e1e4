"""The ``openvino`` format: a folder with ``openvino_model.xml`` and ``.bin``; int8 by NNCF.

Names and layout are those that optimum-intel (``OVModelForSequenceClassification``) and sentence-transformers
(``backend="openvino"``) read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .formats import Batch, Format, Logits, one_tensor
from .quiet import quietly, without_telemetry

FILE = "openvino_model.xml"


def _openvino() -> Any:
    without_telemetry()
    import openvino

    return openvino


@contextmanager
def _own_instruction_set() -> Iterator[None]:
    """Let OpenVINO take the processor's instruction set: where torch's library is told to take a lower one, OpenVINO's
    heeds that in some of its parts only, and crashes."""
    limit = os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
    try:
        yield
    finally:
        if limit is not None:
            os.environ["ONEDNN_MAX_CPU_ISA"] = limit


def write(
    program: torch.export.ExportedProgram,
    names: list[str],
    path: Path,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Fill the folder ``path``; inputs are named ``names``, the outputs ``outputs``. Weights stay in float32."""
    openvino = _openvino()
    with quietly():
        model = openvino.convert_model(program)
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path / FILE, compress_to_fp16=False)


def load(path: Path, threads: int = 1) -> Logits:
    """The folder's model as a function of a batch, run by OpenVINO on the CPU in float32 or int8."""
    openvino = _openvino()
    core = openvino.Core()
    with _own_instruction_set():
        compiled = core.compile_model(
            core.read_model(path / FILE),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                # Otherwise a processor with bfloat16 rounds to it, and the file would not be what was compared.
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
    names = [port.get_any_name() for port in compiled.inputs]
    request = compiled.create_infer_request()
    # The results are copied: the request writes its next ones to the same memory.
    return lambda batch: one_tensor(
        [
            values.copy()
            for values in request.infer(
                {name: batch[name].numpy() for name in names}, share_inputs=True
            ).to_tuple()
        ]
    )


def quantise(source: Path, path: Path, batches: list[Batch]) -> None:
    """int8 weights and activations: static, with SmoothQuant, calibrated on ``batches``."""
    openvino = _openvino()
    import nncf

    model = openvino.Core().read_model(source / FILE)
    names = [port.get_any_name() for port in model.inputs]
    samples = [{name: batch[name].numpy() for name in names} for batch in batches]
    with quietly(), _own_instruction_set():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            # Half the range of weights: a CPU without VNNI adds pairs of products in 16 bits, where the full one
            # overflows.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE
            ),
        )
    openvino.save_model(quantised, path / FILE, compress_to_fp16=False)


FORMAT = Format(
    "openvino",
    write,
    load,
    int8_target="openvino-int8",
    quantise=quantise,
    extra="openvino",
    is_folder=True,
    float32_only=True,
)
