"""Tests that need an extra of the distribution: skipped without it, and importing nothing of it to find out."""

import importlib.util

import pytest

from bert_decomp.extras import EXTRAS


def needs(extra):
    """A mark. ``pytest.importorskip`` would import OpenVINO while tests are collected, its telemetry with it."""
    return pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in EXTRAS[extra]),
        reason=f"pip install 'lowrank-bert[{extra}]'",
    )
