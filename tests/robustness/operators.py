"""Operators under fire: ``python -m tests.robustness.operators [--calls 10000] [--device cuda] [--seed S --case K]``.

Random calls of all four operators (shapes, strides, alignment, dtypes, ranks, biases, activations, which inputs want
gradients) on every backend that the device can run; on a CPU the Triton kernels run in Triton's interpreter, at small
sizes. Forward and backward are held to the bound of ``tests/lowrank_kernels/kernel_cases.py`` against float64; inputs,
and the memory around them, must come out as they went in, and one call in ten is made twice and must repeat to the bit.
A call follows from the seed and its number alone, so ``--seed S --case K`` makes it again. ``--sanitizer TOOL`` runs
all of it under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.records import save_record, suite_file
from bert_decomp.io.environment import environment
from lowrank_kernels.backends import Backend, get_backend, operators, register_backend
from lowrank_kernels.triton_backend.device import interpreted

from .operator_cases import check_case, draw_case

SANITIZERS = ("memcheck", "racecheck", "synccheck")
BACKENDS = ("torch", "registered", "dense", "triton", "cuda")


def register_library_operators() -> None:
    """``registered``: library matmuls behind the registered operators and their written backward passes.

    That is what serves the problems that a fused backend declines.
    """
    register_backend(
        Backend("registered", lambda _: None, lambda *_: None, lambda: operators("torch"))
    )


def usable(device: torch.device, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The backends that run on the device, and why the others do not."""
    reasons = {name: get_backend(name).why_not_on(device) for name in names}
    return [n for n, reason in reasons.items() if reason is None], {
        n: r for n, r in reasons.items() if r is not None
    }


def soak(
    backend: str,
    device: torch.device,
    seed: int,
    calls: int,
    minutes: float,
    largest: int,
    first: int = 0,
) -> tuple[Counter, list[dict[str, Any]]]:
    """``calls`` calls from number ``first`` on, or as many as the minutes give: what they were, and what failed."""
    counts: Counter = Counter()
    failures: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * minutes
    for number in tqdm(
        range(first, first + calls), desc=f"{backend} on {device.type}", unit="call", mininterval=2
    ):
        if time.monotonic() > end:
            break
        case = draw_case(seed, number, largest)
        counts["calls"] += 1
        counts["with gradients"] += bool(case.wanted) and not (
            backend == "dense" and case.dtype.itemsize == 2
        )
        counts["with strided, shifted or expanded inputs"] += any(
            layout != "plain" for layout in case.layouts
        )
        counts["with 0 or 1 rows"] += case.size.rows < 2
        try:
            check_case(case, seed, backend, device)
        except Exception as error:
            failures.append(
                {
                    "backend": backend,
                    "seed": seed,
                    "case": number,
                    "error": f"{type(error).__name__}: {error}",
                }
            )
            tqdm.write(f"{failures[-1]}\n    {case}")
    return counts, failures


def again(options: list[str], prefix: tuple[str, ...] = (), **variables: str) -> int:
    """Run this driver in a process of its own, under another program or with other variables; its exit status."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "tests.robustness.operators", *options],
        check=False,
        env={**os.environ, **variables},
    ).returncode


def main(arguments_: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--calls", type=int, default=10_000, help="calls a backend")
    parser.add_argument("--minutes", type=float, default=60, help="the most time a backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", type=int, help="make this one call again and print it; nothing is written"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--largest", type=int, help="largest size: 320, but 96 in Triton's interpreter"
    )
    parser.add_argument(
        "--sanitizer", choices=SANITIZERS, help="run under compute-sanitizer (needs --device cuda)"
    )
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    parser.add_argument("--name", default="operators", help="of the record in the result file")
    options = parser.parse_args(arguments_)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.sanitizer and options.device != "cuda":
        parser.error("--sanitizer needs --device cuda")
    given = list(sys.argv[1:] if arguments_ is None else arguments_)
    if options.sanitizer:
        program = shutil.which("compute-sanitizer")
        if program is None:
            parser.error(
                "compute-sanitizer is not on PATH; install the CUDA toolkit or leave --sanitizer out"
            )
        place = given.index("--sanitizer")
        del given[place : place + 2]
        return again(
            given,
            (
                program,
                "--tool",
                options.sanitizer,
                "--error-exitcode",
                "1",
                "--target-processes",
                "all",
            ),
        )
    if options.device == "cpu" and "triton" in options.backends and not interpreted():
        # The interpreter must be chosen before Triton is imported, which other libraries may have done.
        return again(given, TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    return soak_all(options, torch.device(options.device, 0 if options.device == "cuda" else None))


def soak_all(options: argparse.Namespace, device: torch.device) -> int:
    register_library_operators()
    names, reasons = usable(device, options.backends)
    for name, reason in reasons.items():
        print(f"backend {name} is left out: {reason}")
    asked = {key: value for key, value in vars(options).items() if key not in ("output", "name")}
    counts: dict[str, int] = {}
    failures: list[dict[str, Any]] = []
    for name in names:
        emulated = name == "triton" and device.type == "cpu"
        largest = options.largest or (96 if emulated else 320)
        if options.case is not None:
            print(draw_case(options.seed, options.case, largest))
        calls, first = (options.calls, 0) if options.case is None else (1, options.case)
        found, wrong = soak(name, device, options.seed, calls, options.minutes, largest, first)
        label = f"{name} (interpreter)" if emulated else name
        counts |= {f"{what}, {label}": count for what, count in found.items()}
        failures += wrong
        if options.case is None:
            # After each backend, so that what was run counts even if the next one is stopped.
            save_record(
                options.output,
                options.name,
                {
                    "driver": "operators",
                    "options": {**asked, "left_out": reasons},
                    "counts": counts,
                    "failures": failures,
                    "environment": environment(),
                },
            )
    print(f"seed {options.seed}: {counts}; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
