"""Exporters without their progress and advice, which mean nothing to someone who only exports."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "nncf", "root")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence warnings and the exporters' loggers below errors."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from sending usage data: without this module they fall back to a stub that sends none.

    It works only before they are imported; later imports of ``openvino_telemetry`` in this process fail.
    """
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
