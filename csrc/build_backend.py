"""The build backend: scikit-build-core, and the one decision it cannot make, whether there is a CUDA compiler.

With nvcc the CUDA kernels in this folder are compiled, and the headers they need become a build requirement; without it
the package installs in a minute with the CPU kernels alone. Environment variables:
    LOWRANK_CUDA        "skip" installs without CUDA kernels even where there is an nvcc
    LOWRANK_CUDA_ARCHS  "80", "90a" or "80,90a" (the default)
    CUDACXX, CUDA_HOME  which nvcc, if it is not on PATH or in /usr/local/cuda
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scikit_build_core import build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Of the CPU kernels, which are built wherever there is a C++ compiler for x86-64.
REQUIREMENTS = ["pybind11>=2.13,<4"]
CUDA_REQUIREMENTS = ["nvidia-cutlass>=4.2,<4.3"]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where there is none or it is not wanted.

    Raises:
        SystemExit: LOWRANK_CUDA has a value it cannot have.
    """
    wish = os.environ.get("LOWRANK_CUDA", "")
    if wish not in ("", "skip"):
        raise SystemExit(f'LOWRANK_CUDA is {wish!r}; it must be "skip" or unset')
    if wish == "skip":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [
        os.environ.get("CUDACXX"),
        "nvcc",
        *(f"{h}/bin/nvcc" for h in (home, "/usr/local/cuda") if h),
    ]
    return next(
        (str(Path(found).resolve()) for found in map(shutil.which, filter(None, places)) if found),
        None,
    )


def _prepare() -> None:
    nvcc = find_nvcc()
    os.environ["LOWRANK_NVCC"] = nvcc or ""
    os.environ["LOWRANK_NO_KERNELS"] = (
        "LOWRANK_CUDA=skip was set" if os.environ.get("LOWRANK_CUDA") == "skip" else ""
    )


def _requirements() -> list[str]:
    return REQUIREMENTS + (CUDA_REQUIREMENTS if find_nvcc() else [])


def get_requires_for_build_wheel(config_settings=None):
    return build.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _prepare()
    return build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _prepare()
    return build.build_editable(wheel_directory, config_settings, metadata_directory)
