"""Registers the low-rank format with transformers as soon as transformers can load a model, and not before.

The registry is transformers' own, and importing it takes torch and a second. ``import bert_decomp`` must not wait for
that, yet ``import bert_decomp; AutoModelForSequenceClassification.from_pretrained(folder)`` must work: the format is
registered right after the import of the module that every ``from_pretrained`` of a model goes through. Modules of
single architectures may be half-imported at that moment, so nothing that ``saving`` imports may import one of them at
its top.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

MODULE = "transformers.modeling_utils"


def register_low_rank() -> None:
    """Register now if transformers' models are there already, else when they are first imported."""
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # Its decorators register the format.
    importlib.import_module("bert_decomp.models.saving")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``MODULE`` where it would be found anyway, and lets its loader register the format afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The loader of ``MODULE``, and the registration after it."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as if it had been found without this one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
