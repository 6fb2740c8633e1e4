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
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..triton_backend.tiles import ffn_pieces, pieces
from .compile_cases import ARCHS, DTYPES, VARIANTS, Case, cases

if TYPE_CHECKING:
    from triton import JITFunction

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
# The optional pointers that a variant does not pass.
_OPTIONAL = {
    ("linear", "forward"): ("residual", "hidden", "pre"),
    ("linear", "training"): ("residual",),
    ("linear", "backward"): ("bias", "pre"),
    ("qkv", "forward"): ("hidden_q", "hidden_k", "hidden_v"),
    ("qkv", "training"): (),
    ("ffn", "forward"): ("p", "q", "parts"),
    ("ffn", "training"): ("parts",),
    ("ffn", "split"): ("p", "q"),
    ("ffn", "reduce"): ("q",),
    ("linear_norm", "forward"): ("hidden",),
    ("linear_norm", "training"): (),
    ("attention", "forward"): (),
}
_POINTER = re.compile(
    r"(x|y|p|q|k|v|asking|bounds|parts|pre|residual|weight|shift|(down|up|bias|hidden)(1|2|_q|_k|_v)?)$"
)


# Elements of pointers that have not the operator's own.
_ELEMENTS = {"parts": "fp32", "asking": "i32", "bounds": "i32"}
# Numbers that are not specialised on.
_UNMARKED = ("M", "eps", "splits", "column_splits")


@dataclass(frozen=True)
class Report:
    """What the assembler made of a case; ``problems`` is empty when the case is sound."""

    case: Case
    registers: int
    local_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    wide_loads: int
    problems: tuple[str, ...]


def _kernel(case: Case) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of a case and its constexpr arguments."""
    module = importlib.import_module(f"lowrank_kernels.triton_backend.{case.operator}")
    kernel = (
        module.ffn_reduce_kernel
        if case.variant == "reduce"
        else getattr(module, f"{case.operator}_kernel")
    )
    tile = case.tile
    if case.operator == "attention":
        sizes = {"BM": tile.block_m, "BN": tile.block_n, "BD": case.rank, "BE": case.rank}
        others = {"UNIT": module.UNIT, "PRECISION": DTYPES[case.dtype][2], "UPCAST": False}
        return kernel, {**sizes, **others}
    a, b = ffn_pieces(case.rank, ARCHS[case.arch]) if case.operator == "ffn" else pieces(case.rank)
    values = {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "BF": tile.block_f,
        "A": a,
        "B": b,
        "A1": a,
        "B1": b,
        "A2": a,
        "B2": b,
        "AQ": a,
        "BQ": b,
        "AK": a,
        "BK_": b,
        "AV": a,
        "BV": b,
        "ACTIVATION": "none" if case.variant == "backward" else "gelu",
        "PRECISION": DTYPES[case.dtype][2],
        "UPCAST": False,
        "TRANSPOSED": case.operator == "ffn" and module.transposed(tile, a, ARCHS[case.arch]),
    }
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    constants |= {name: None for name in _OPTIONAL[case.operator, case.variant]}
    # A factor is contiguous along its last dimension; the backward pass reads it transposed.
    inner = re.compile(
        r"stride_(d\w?r|u\w?n)$" if case.variant == "backward" else r"stride_(d\w?[kf]|u\w?r)$"
    )
    constants |= {name: 1 for name in kernel.arg_names if inner.match(name)}
    if case.operator == "ffn":
        constants["stride_d2f"] = 1
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, constants


def _compile(case: Case) -> tuple[bytes, int, str]:
    """The cubin of a case, its shared memory in bytes, and Triton's last form of it."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = _kernel(case)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if _POINTER.match(name):
            element = _ELEMENTS.get(name, DTYPES[case.dtype][0])
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name in ("eps", "scale") else "i32"
        # Triton marks what is a multiple of 16: base addresses, and the sizes and strides of real layers. Those of
        # attention are in units.
        if name not in _UNMARKED and (case.operator != "attention" or _POINTER.match(name)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton_compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={
            "num_warps": case.tile.warps,
            "num_stages": case.tile.stages,
            "enable_fp_fusion": True,
        },
    )
    return compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttgir"]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource line and the machine code of a cubin, from the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        texts = [
            subprocess.run(
                [str(tool), option, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        ]
    return texts[0], texts[1]


def check(case: Case) -> Report:
    """Compile one case and list what is wrong with it."""
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    cubin, shared, form = _compile(case)
    resources, code = _disassemble(cubin)
    usage = {key: int(value) for key, value in re.findall(r"(REG|LOCAL|STACK):(\d+)", resources)}
    opcodes = Counter(
        re.findall(r"\b((?:HGMMA|HMMA|UTCHMMA|UTCQMMA|LDL|STL|LDGSTS|LDG)[.\w]*)", code)
    )

    def count(prefix: str, part: str = "") -> int:
        return sum(
            n for name, n in opcodes.items() if name.split(".")[0] == prefix and part in name
        )

    local = usage["LOCAL"] + usage["STACK"]
    wide = count("LDGSTS", ".128") + count("LDG", ".128")
    problems = []
    if local or count("LDL") or count("STL"):
        problems.append(f"spills to local memory ({local} bytes)")
    limit = ARCHS[case.arch].shared_bytes
    if shared > limit:
        problems.append(f"needs {shared} bytes of shared memory, sm_{case.arch} has {limit}")
    # Only bias vectors may be loaded in smaller portions than 16 bytes; tiles have two dimensions.
    copies = re.findall(
        r"async_copy_global_to_local.*contiguity = (\d+).*: tensor<(\d+)x(\d+)x!", form
    )
    threads, itemsize = 32 * case.tile.warps, DTYPES[case.dtype][1].itemsize

    def least(rows: str, columns: str) -> int:
        # Keys of small heads are fewer than 16 bytes for each thread.
        share = int(rows) * int(columns) * itemsize // threads
        return min(16, share) if case.operator == "attention" else 16

    if not wide or any(int(portion) * itemsize < least(*size) for portion, *size in copies):
        problems.append("loads tiles in less than 128 bits")
    if case.bits16 and case.tile.block_m >= 64 and case.arch == 90 and not count("HGMMA"):
        problems.append("uses no wgmma")
    if case.bits16 and not count("HGMMA") + count("HMMA") + count("UTCHMMA"):
        problems.append("uses no tensor core")
    return Report(
        case, usage["REG"], local, shared, count("HGMMA"), count("HMMA"), wide, tuple(problems)
    )


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
