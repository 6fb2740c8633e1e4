"""Which of the distribution's extras brings which package: a missing one is named with the command to install it."""

from __future__ import annotations

import importlib.util

from .errors import UserError

# Packages by the name under which they are imported.
EXTRAS = {
    "bert": (
        "transformers",
        "datasets",
        "accelerate",
        "safetensors",
        "sklearn",
        "scipy",
        "numpy",
        "pandas",
        "pyarrow",
        "yaml",
        "tqdm",
    ),
    "tokens": ("seqeval",),
    "report": ("matplotlib", "jinja2"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "ray": ("ray",),
}


def install_hint(package: str) -> str | None:
    """What to do about a missing package; None if no extra brings it.

    >>> install_hint("matplotlib.pyplot")
    "matplotlib is not installed; pip install 'lowrank-bert[report]'"
    """
    root = package.partition(".")[0]
    for extra, packages in EXTRAS.items():
        if root in packages:
            return f"{root} is not installed; pip install 'lowrank-bert[{extra}]'"
    return None


def require(extra: str) -> None:
    """Raise UserError if a package of ``extra`` is missing, before work begins that would need it at its end."""
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise UserError(str(install_hint(package)))
