"""What a result was made with: versions, machine, and the commit of this source tree when it is a checkout."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lowrank_kernels.env import cpu_features, cpu_name, package_version

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "scikit-learn",
    "numpy",
    "triton",
)


def commit() -> str | None:
    """Commit of the source tree that this package was imported from, with ``+`` if it has changes; None elsewhere.

    Result files are left out: making one must not change the stamp of the next.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ".",
                ":!benchmarks/results",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """Versions and machine as a plain dict."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "commit": commit(),
    }
