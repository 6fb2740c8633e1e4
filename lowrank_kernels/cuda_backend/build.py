"""What the installation built: the compiled module, or why there is none."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType

MODULE = f"{__name__.partition('.')[0]}._cuda"


@cache
def module() -> ModuleType | None:
    """The compiled module, or None where the installation has none."""
    return importlib.import_module(MODULE) if importlib.util.find_spec(MODULE) is not None else None


def files() -> Path | None:
    """The folder with the build's records, ``build.json`` and ``ptxas.txt``; None if nothing was installed.

    An editable installation keeps them apart from the sources, so the metadata of the installation is asked.
    """
    beside = Path(__file__).parent
    if (beside / "build.json").exists():
        return beside
    for path in importlib.metadata.files("lowrank-bert") or ():
        if path.name == "build.json" and path.parent.name == "cuda_backend":
            return Path(path.locate()).parent
    return None


def why_not_built() -> str | None:
    """None if the kernels were built, else the reason in one clause."""
    if module() is not None:
        return None
    try:
        folder = files()
    except importlib.metadata.PackageNotFoundError:
        folder = None
    if folder is None:
        return "not built: the package is not installed, or was installed without its kernels"
    return f"not built: {json.loads((folder / 'build.json').read_text(encoding='utf-8')).get('reason', 'unknown')}"
