"""Compile the tuning space for GPUs that are not here, and read what the assembler made of it.

    python -m lowrank_kernels.tools.compile_check               # the default tiles, a minute or two on two cores
    python -m lowrank_kernels.tools.compile_check --all         # every tile of the space, half an hour on two cores
    python -m lowrank_kernels.tools.compile_check --all --arch 80 90 --write docs/concepts/operators.md

Triton keeps what it compiled by a digest of the kernel's source, so that a second run compiles what has changed. Every
case must use no local memory (no spill), no more shared memory than the GPU has, 128-bit asynchronous loads, and, for
16-bit inputs on sm_90 with blocks of 64 rows or more, wgmma. This needs no GPU and proves nothing about speed; it finds
what the interpreter accepts and a GPU would not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from .compile_cases import ARCHS, VARIANTS, Case, cases
from .compiled import Report, check

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


def check_all(chosen: Iterable[Case], processes: int = 2) -> list[Report]:
    """Check cases in parallel, in their order, with a count on stderr."""
    chosen = list(chosen)
    reports = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for report in pool.map(check, chosen):
            reports.append(report)
            print(f"\rcompiled {len(reports)}/{len(chosen)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return reports


def table(reports: Iterable[Report]) -> str:
    """The Markdown table for the docs: a row for each tile and variant, both GPUs; dtypes of equal needs share one."""
    rows: dict[tuple, dict[int, Report]] = {}
    for report in reports:
        case = report.case
        key = (case.operator, case.rank, replace(case.tile, splits=1), case.variant, case.dtype)
        rows.setdefault(key, {})[case.arch] = report
    lines = [
        "| operator | variant | rank | dtype | rows x columns x depth (neurons) | warps, stages "
        "| sm_80 registers, shared KiB | sm_90 registers, shared KiB, wgmma | local memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    texts: dict[tuple, list[str]] = {}
    for (operator, rank, tile, variant, dtype), found in rows.items():
        cells = [
            f"{one.registers}, {one.shared_bytes / 1024:.0f}"
            + (f", {one.wgmma}" if arch == 90 else "")
            if one
            else "not used"
            for arch in (80, 90)
            for one in [found.get(arch)]
        ]
        local = sum(report.local_bytes for report in found.values())
        texts.setdefault((operator, variant, rank, tile, *cells, local), []).append(dtype)
    for (operator, variant, rank, tile, *cells, local), dtypes in texts.items():
        blocks = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
        blocks += f" ({tile.block_f})" if tile.block_f else ""
        lines.append(
            f"| {operator} | {variant} | {rank} | {', '.join(dtypes)} | {blocks} "
            f"| {tile.warps}, {tile.stages} | {cells[0]} | {cells[1]} | {local} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_kernels.tools.compile_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--all", action="store_true", help="every tile of the tuning space, not a part of it"
    )
    parser.add_argument("--operator", choices=VARIANTS, help="this operator only")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, help="GPUs by compute capability, as 80 90"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="compilations at a time"
    )
    parser.add_argument(
        "--write", type=Path, help="a Markdown file whose resource table is replaced"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it", file=sys.stderr
        )
        return 2
    chosen = [
        case
        for case in cases(options.all, options.arch)
        if options.operator in (None, case.operator)
    ]
    reports = check_all(chosen, options.processes)
    text = table(reports)
    if options.write:
        before, rest = options.write.read_text(encoding="utf-8").split(BEGIN)
        options.write.write_text(
            f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )
    else:
        print(text)
    bad = [report for report in reports if report.problems]
    for report in bad:
        print(f"{report.case}: {'; '.join(report.problems)}", file=sys.stderr)
    print(f"{len(reports)} compilations, {len(bad)} unsound", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
