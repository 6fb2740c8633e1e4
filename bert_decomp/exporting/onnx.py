"""The ``onnx`` format, run by onnxruntime; int8 by onnxruntime's own tool."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from .formats import Batch, Format, Logits, one_tensor
from .quiet import quietly

# A protobuf message, and so an ONNX file with its weights inside, cannot be larger: the weights then go beside it.
SIZE_LIMIT = 2 * 2**30
DATA_SUFFIX = ".data"


def write(
    program: torch.export.ExportedProgram,
    names: list[str],
    path: Path,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """One file with the weights inside, or beside it where they are too large; inputs are named ``names``, the
    outputs ``outputs``.

    Raises:
        UserError: the weights are in bfloat16.
    """
    tensors = program.state_dict.values()
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise UserError(
            "onnxruntime runs no bfloat16 on a CPU; call .float() or .half() on the model first"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with quietly():
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=list(outputs), verbose=False
        )
        assert onnx is not None  # with dynamo=True
        onnx.save(str(path), external_data=size >= SIZE_LIMIT)


def load(path: Path, threads: int = 1) -> Logits:
    """An ONNX file as a function of a batch, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda batch: one_tensor(
        session.run(None, {name: batch[name].numpy() for name in names})
    )


def quantise(source: Path, path: Path, batches: list[Batch]) -> None:
    """int8 weights, and activations quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quietly():
        # Transposed weights become plain ones first; the tool passes by a matmul whose weight is computed.
        plain = Path(folder) / "plain.onnx"
        large = source.with_name(source.name + DATA_SUFFIX).exists()
        quant_pre_process(
            str(source), str(plain), skip_symbolic_shape=True, save_as_external_data=large
        )
        # Seven bits of the eight: a CPU without VNNI adds pairs of products in 16 bits, where eight overflow. With
        # eight, a low-rank model that had 94.5 % of its answers right had 21 % on such a CPU.
        quantize_dynamic(str(plain), str(path), per_channel=True, reduce_range=True)


FORMAT = Format(
    "model.onnx",
    write,
    load,
    int8_target="model.int8.onnx",
    quantise=quantise,
    extra="export",
    data_suffix=DATA_SUFFIX,
)
