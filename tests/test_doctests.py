"""Every example in a docstring runs and gives what it shows."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import bert_decomp
import lowrank_kernels

ROOT = Path(__file__).resolve().parent.parent


# More than a second each.
SLOW = {"bert_decomp.exporting.export"}


def modules_with_examples():
    for package in ("bert_decomp", "lowrank_kernels", "tests/csrc"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                yield pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "package", [bert_decomp, lowrank_kernels], ids=lambda package: package.__name__
)
def test_every_public_name_has_an_example(package):
    without = [
        name for name in package.__all__ if ">>> " not in inspect.getdoc(getattr(package, name))
    ]
    assert not without
