"""Measure the rivals on this GPU and write the table that ``backend="auto"`` reads.

    python -m lowrank_kernels.tune                       # BERT-base and BERT-large shapes, bfloat16
    python -m lowrank_kernels.tune --dtype float16 --ranks 64 128 --output my_tables

For each problem the two library matmuls, the dense product and every set of options of every backend (tiles and splits) are
checked against each other and timed; the fastest is written with the times of all backends. The file is replaced whole
after each problem, so an interrupted run keeps what it measured, and a later run adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import env, measure, tuning
from ..backends import FALLBACK, Options, backend_names, get_backend, operators, why_not
from ..problem import Problem

OPERATORS = ("linear", "qkv", "ffn", "linear_norm")

WIDTHS = ((768, 3072), (1024, 4096))
ROWS = (1, 16, 128, 512, 2048, 4096, 16384, 65536)
RANKS = (64, 96, 128, 192, 256, 384)
# A rival that differs from two matmuls by more than this part of the largest value is wrong, and no rival.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def problems(
    chosen: list[str], rows: list[int], ranks: list[int], dtype: torch.dtype
) -> Iterator[Problem]:
    """The problems of BERT layers: the linears, both ways round for the backward pass, QKV, FFN, output + norm."""
    for width, hidden in WIDTHS:
        shapes = {
            "linear": ((width, width, 0), (width, hidden, 0), (hidden, width, 0)),
            "qkv": ((width, width, 0),),
            "ffn": ((width, width, hidden),),
            "linear_norm": ((width, width, 0), (hidden, width, 0)),
        }
        for operator in chosen:
            for inner, outer, neurons in shapes[operator]:
                for rank in ranks:
                    for count in rows:
                        yield Problem(operator, count, inner, outer, rank, dtype, neurons)


def arguments(problem: Problem, device: torch.device) -> tuple[Tensor, Callable[..., object]]:
    """Random arguments of a problem: its x, and a function that calls an operator function on an x."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device, generator=generator) / max(shape[-1], 1) ** 0.5
        return values.to(problem.dtype)

    m, k, n, r, f = problem.rows, problem.inner, problem.outer, problem.rank, problem.hidden
    x = torch.randn(m, k, device=device, generator=generator).to(problem.dtype)
    if problem.operator == "ffn":
        rest = (
            normal(r, k),
            normal(f, r),
            normal(f),
            normal(r, f),
            normal(n, r),
            normal(n),
            "gelu",
        )
    elif problem.operator == "qkv":
        rest = tuple(tuple(normal(*shape) for _ in range(3)) for shape in ((r, k), (n, r), (n,)))
    elif problem.operator == "linear_norm":
        rest = (normal(r, k), normal(n, r), normal(n), normal(m, n), normal(n), normal(n), 1e-12)
    else:
        rest = (normal(r, k), normal(n, r), normal(n), "none")
    return x, lambda function, value, **options: function(value, *rest, **options)


def candidates(problem: Problem, device: torch.device) -> Iterator[tuple[str, Options]]:
    """The backends that may serve a problem here, each with every set of options it wants timed."""
    for name in backend_names():
        if why_not(name, problem, device) is None:
            for options in get_backend(name).candidates(problem, device):
                yield name, options


def _largest_difference(mine: object, right: object) -> float:
    """The largest difference of the first results, relative to the largest value."""
    while isinstance(mine, tuple):
        mine, right = mine[0], right[0]
    scale = right.abs().max().item() or 1.0
    return (mine.float() - right.float()).abs().max().item() / scale


def fastest(problem: Problem, device: torch.device, budget: float) -> tuning.Entry:
    """Time all candidates of a problem and return the winner with each backend's best median."""
    x, call = arguments(problem, device)
    inputs = measure.ring(x, measure.ring_length(x.numel() * x.element_size()))
    right = call(operators(FALLBACK)[problem.operator], x)
    best: dict[str, tuple[float, Options]] = {}
    for backend, options in candidates(problem, device):
        function = operators(backend)[problem.operator]
        keywords = get_backend(backend).parse_options(options)
        label = " ".join([backend, *map(str, options.values())])
        try:
            if _largest_difference(call(function, x, **keywords), right) > TOLERANCE[problem.dtype]:
                print(f"\n{problem}: {label} is wrong and was left out", file=sys.stderr)
                continue
            median = measure.milliseconds(
                lambda value: call(function, value, **keywords), inputs, budget
            )[1]
        except Exception as error:
            # A tile may need more than this GPU has; the others are still worth timing.
            print(f"\n{problem}: {label} failed: {error}", file=sys.stderr)
            continue
        if backend not in best or median < best[backend][0]:
            best[backend] = (median, options)
    winner = min(best, key=lambda name: best[name][0])
    return tuning.Entry(winner, best[winner][1], {name: value[0] for name, value in best.items()})


def write(path: Path, device: str, entries: dict[str, dict]) -> None:
    """Replace a table file whole."""
    content = {
        "version": tuning.VERSION,
        "device": device,
        "environment": env.describe(),
        "entries": entries,
    }
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def measured(path: Path) -> dict[str, dict]:
    """The entries of a table file, to be added to; none if there is no file.

    Raises:
        TableError: it is damaged.
    """
    if not path.exists():
        return {}
    text = tuning.read(path)
    tuning.parse(text, str(path))
    return json.loads(text)["entries"]


def main(arguments_: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_kernels.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument(
        "--budget", type=float, default=0.02, help="seconds of timing for each candidate"
    )
    parser.add_argument(
        "--output", type=Path, default=tuning.folders()[0], help="folder of the table"
    )
    options = parser.parse_args(arguments_)
    if not torch.cuda.is_available():
        print(
            "tuning measures a GPU and torch sees none; without a table two matmuls are used",
            file=sys.stderr,
        )
        return 2
    device = env.device_of_choice()
    name = torch.cuda.get_device_name(device)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / tuning.file_name(name)
    try:
        entries = measured(path)
    except tuning.TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo = list(
        problems(options.operators, options.rows, options.ranks, getattr(torch, options.dtype))
    )
    for index, problem in enumerate(todo):
        entry = fastest(problem, device, options.budget)
        entries[tuning.key(problem)] = {
            "backend": entry.backend,
            "options": entry.options,
            "milliseconds": entry.milliseconds,
            "rank": problem.rank,
        }
        write(path, name, entries)
        filled = 30 * (index + 1) // len(todo)
        print(
            f"\r[{'#' * filled}{'.' * (30 - filled)}] {index + 1}/{len(todo)} {tuning.key(problem)}: "
            f"{entry.backend}      ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(f"\nwrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
