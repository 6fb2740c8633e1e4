"""What the stages need of Triton, compiled before the visit and without a GPU.

    python -m benchmarks.gpu.ahead FOLDER [SECONDS]     # writes FOLDER.tar.gz as well

Triton keeps a compiled kernel under a digest of its own files, the kernel's source, ptxas, the options and the target;
nothing of that is the machine's. So an environment with the versions of the GPU's machine fills a cache here, and
``python -m benchmarks.gpu --ahead FOLDER.tar.gz`` finds it there. With other versions the kernels are only compiled
once more. What Triton has a C compiler make for launches is spared as well.

Run again with the same folder, it compiles what is missing. Each stage says how much it still had to compile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

GROUP = "__grp__"


def bring(ahead: Path, cache: Path) -> int:
    """Copy the entries that a cache lacks into it, and return how many: groups name their files by absolute paths.

    Args:
        ahead: a folder that was filled, or its archive.
        cache: Triton's.
    """
    if ahead.is_file():
        with TemporaryDirectory() as temporary, tarfile.open(ahead) as archive:
            archive.extractall(temporary, filter="data")
            return bring(Path(temporary), cache)
    count = 0
    for entry in sorted(path for path in ahead.iterdir() if path.is_dir()):
        target = cache / entry.name
        if target.exists():
            continue
        # Whole or not at all: a stage may be looking.
        part = cache / f".{entry.name}.{os.getpid()}"
        shutil.copytree(entry, part, ignore=shutil.ignore_patterns("lock", "tmp.*", "*.source"))
        for group in part.glob(f"{GROUP}*"):
            names = json.loads(group.read_text())["child_paths"]
            kept = {name: str(target / name) for name in names if (part / name).exists()}
            group.write_text(json.dumps({"child_paths": kept}))
        part.replace(target)
        count += 1
    return count


@contextlib.contextmanager
def counted(counts: dict[str, float]) -> Iterator[None]:
    """Count what Triton compiles inside the block, and what it finds in its cache."""
    from triton import knobs

    counts |= {"compiled": 0, "found": 0, "compiler_seconds": 0.0}

    def heard(*, times: object, cache_hit: bool, **_: object) -> None:
        counts["found" if cache_hit else "compiled"] += 1
        counts["compiler_seconds"] += times.total / 1e6  # type: ignore[attr-defined]

    before, knobs.compilation.listener = knobs.compilation.listener, heard
    try:
        yield
    finally:
        knobs.compilation.listener = before


def _library(folder: Path) -> None:
    """A stand-in for the driver's library, with its names: launchers are linked against it and find the real one."""
    from triton.backends.nvidia import driver

    text = (
        Path(driver.__file__).read_text() + Path(driver.__file__).with_name("driver.c").read_text()
    )
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", text)))
    source = folder / "cuda.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    library = str(folder / "libcuda.so.1")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
    subprocess.run(["gcc", *options, str(source)], check=True)


def _make_launcher(source: object, metadata: object) -> None:
    """Build into the cache what Triton compiles in C for a launch; without a driver it cannot be loaded."""
    from triton.backends.nvidia import driver

    with contextlib.suppress(ImportError, RuntimeError, OSError):
        driver.CudaUtils()
    # Newer ones have one launcher for all kernels.
    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            driver.CudaLauncher(source, metadata)


def _calls() -> Iterator[Callable[[], object]]:
    """Everything that the stages ask of Triton, the most valuable first, as calls that compile it."""
    import torch

    import bert_decomp.runtime
    from lowrank_kernels import LowRankLinear, calibration, rivals
    from lowrank_kernels.problem import Problem
    from lowrank_kernels.triton_backend import support

    from . import micro, sweep
    from .models import models_of, units_of
    from .results import Results, Setting

    setting = Setting(Results(Path(os.devnull)), time.time() + 1e6)
    cpu = torch.device("cpu")

    def of_tile(problem: Problem, options: dict) -> Callable[[], object]:
        # The rows of x decide nothing but the tile, which is given.
        few = problem._replace(rows=min(problem.rows, 64))
        x, factors, rest = rivals.arguments(few, cpu)
        return lambda: rivals.prepared("triton", problem, factors, rest, options)(x)

    def of_problems(problems: dict[Problem, None]) -> Iterator[Callable[[], object]]:
        for problem in problems:
            for rows in calibration.ROWS:
                sized = problem._replace(rows=rows)
                if support.why_not_for(sized, cpu) is None:
                    yield from (of_tile(sized, dict(o)) for o in support.likely(sized, cpu))

    for make in (models_of, units_of):
        problems: dict[Problem, None] = {}
        with mock.patch.object(
            bert_decomp.runtime,
            "calibrate",
            lambda found, _, known=problems: known.update(dict.fromkeys(found)),
        ):
            models, _, _ = make(setting)
        yield from of_problems(problems)
        if make is models_of:
            layers = {
                (m.in_features, m.out_features, m.rank, m.bias is None): m
                for (_, form), model in models.items()
                if form == "unfused"
                for m in model.modules()
                if isinstance(m, LowRankLinear)
            }
            yield from (_training_step(layer) for layer in layers.values())
        del models
    yield from (of_tile(problem, options) for problem, options in sweep.candidates(cpu))
    yield from (of_tile(problem, options) for problem, options in micro.default_tiles(setting, cpu))


def _training_step(layer: object) -> Callable[[], object]:
    import torch

    import lowrank_kernels as lk

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad(), lk.use_backend("triton"):
            twin = layer.to(torch.bfloat16).requires_grad_()  # type: ignore[attr-defined]
            x = torch.zeros(4096, twin.in_features, dtype=torch.bfloat16, requires_grad=True)
            twin(x).sum().backward()

    return step


def fill(folder: Path, seconds: float) -> dict[str, float]:
    """Compile into a folder for so long; how many kernels that were, and how many were there."""
    from benchmarks import host_path
    from lowrank_kernels.triton_backend import launch

    counts: dict[str, float] = {}
    end = time.time() + seconds
    stub = host_path.install()
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    stub.launcher_cls = lambda source, metadata: _make_launcher(source, metadata) or stub._launch
    with TemporaryDirectory() as temporary, counted(counts):
        _library(Path(temporary))
        os.environ["TRITON_LIBCUDA_PATH"] = temporary
        waiting: list[Callable[[], object]] = []

        def compile_waiting() -> None:
            with launch.compile_ahead():
                for call in waiting:
                    call()
            # And once more, for the launchers.
            for call in waiting:
                call()
            waiting.clear()

        for call in _calls():
            waiting.append(call)
            if len(waiting) >= 16:
                compile_waiting()
                print(f"\r{counts['compiled']} compiled", end="", file=sys.stderr, flush=True)
            if time.time() > end:
                break
        compile_waiting()
    print(file=sys.stderr)
    return counts


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2) or os.environ.get("TRITON_INTERPRET") == "1":
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    counts = fill(folder, float(arguments[1]) if arguments[1:] else 3600.0)
    archive = Path(shutil.make_archive(str(folder), "gztar", folder))
    print(f"{json.dumps(counts)}; {archive.name}: {archive.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
