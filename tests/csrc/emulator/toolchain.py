"""The PTX of the kernels' files, made by the compiler and with the flags that build them, and the program ``trace``.

Both are kept by the digest of what they are made from, so that only what has changed is compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .ptx import Kernel, kernels

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
TRACE = ROOT / "tests" / "csrc" / "trace.cpp"


@cache
def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def _cutlass() -> Path | None:
    package = importlib.util.find_spec("cutlass_library")
    places = package.submodule_search_locations if package else None
    return Path(places[0]) / "source" / "include" if places else None


def why_not() -> str | None:
    """What the machine lacks to make PTX and plans, or None."""
    if nvcc() is None:
        return "no nvcc on PATH"
    if _cutlass() is None:
        return "no CUTLASS headers: pip install --no-deps 'nvidia-cutlass>=4.2,<4.3'"
    return None if shutil.which("g++") else "no g++ on PATH"


def flags(arch: str) -> list[str]:
    """What CMakeLists.txt gives the compiler of a kernel, less what is for the assembler and the host compiler."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    options = re.search(r"target_compile_options\(sm\$\{arch\} PRIVATE ([^)]*)\)", text).group(1)
    standard = re.search(r"CMAKE_CUDA_STANDARD (\d+)", text).group(1)
    kept = [o for o in options.split() if not o.startswith(("-Xptxas", "-Xcompiler"))]
    release = ["-O3", "-DNDEBUG", f"-std=c++{standard}"]
    return [*release, *(option.replace("${arch}", arch) for option in kept)]


@cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def _made(folder: Path, name: str, sources: Sequence[Path], command: Sequence[str]) -> Path:
    """The file ``name`` that the command makes with ``-o``, unless the folder has it from the same sources."""
    digest = hashlib.sha256("\0".join([*command, _version(command[0])]).encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    stem, suffix = os.path.splitext(name)
    result = folder / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{stem}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in folder.glob(f"{stem}-*{suffix}"):
                old.unlink()
            part = result.with_name(f"part-{result.name}")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            part.replace(result)
    return result


def ptx_text(file: str, folder: Path) -> str:
    """The PTX of ``<file>.cu``, in csrc or beside ``trace.cpp``, kept in ``folder``."""
    arch = file.rsplit("_sm", 1)[1]
    source = next(
        path for path in (CSRC / f"{file}.cu", TRACE.with_name(f"{file}.cu")) if path.exists()
    )
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh")]
    command = [nvcc(), "-ptx", *flags(arch), "-I", str(CSRC), "-isystem", str(_cutlass())]
    return _made(folder, f"{file}.ptx", [*headers, source], [*command, str(source)]).read_text(
        encoding="utf-8"
    )


@cache
def kernels_of(file: str, folder: Path) -> tuple[Kernel, ...]:
    return tuple(kernels(ptx_text(file, folder)))


def trace(folder: Path) -> Path:
    """The program of ``tests/csrc/trace.cpp``."""
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-I", str(CSRC), str(TRACE)]
    return _made(folder, "trace", [*CSRC.glob("*.h"), TRACE], command)
