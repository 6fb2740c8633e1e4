"""What Triton and the assembler make of one case of ``compile_cases``, and what is wrong with it."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..triton_backend.tiles import ffn_pieces, pieces
from .compile_cases import ARCHS, DTYPES, Case

if TYPE_CHECKING:
    from triton import JITFunction

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
