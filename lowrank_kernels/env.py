"""Print what a bug report needs: versions, the GPU, which backends are usable here, and if not, why not.

python -m lowrank_kernels.env
"""

from __future__ import annotations

import importlib.metadata
import platform
import signal
import sys

import torch

from . import cpu, dispatch, tuning
from .backends import backend_names, get_backend

# Instruction sets that decide how fast a CPU multiplies, by Linux's names.
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_field(name: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, None where the system has no such file or field."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(name):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def cpu_name() -> str:
    """The processor's model name, as far as the system tells it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of ``CPU_FEATURES`` that the processor has, as far as the system tells them."""
    flags = (_cpu_field("flags") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def device_of_choice() -> torch.device:
    """The first GPU if torch sees one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe() -> dict[str, str]:
    """Versions and devices by name, for reports and result files."""
    result = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": package_version("triton") or "not installed",
        "cpu": cpu_name(),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = torch.cuda.get_device_name(0)
        result["capability"] = f"{properties.major}.{properties.minor}"
        result["multiprocessors"] = str(properties.multi_processor_count)
        result["cuda"] = str(torch.version.cuda)
    return result


def main() -> int:
    for name, value in describe().items():
        print(f"{name:16} {value}")
    unusable = cpu.why_not()
    found = ", ".join(cpu.levels()) if unusable is None else f"not usable: {unusable}"
    print(f"{'cpu kernels':16} {found}")
    device = device_of_choice()
    for name in backend_names():
        backend = get_backend(name)
        reason = backend.why_not_on(device)
        state = "usable" if reason is None else f"not usable: {reason}"
        checked = backend.checked_on or "no GPU: unverified"
        print(f"{'backend ' + name:16} {state} (checked on {checked})")
    if device.type == "cuda":
        gpu = tuning.gpu(device.index)
        path = tuning.find_file(gpu)
        print(f"{'tuning table':16} {path or 'none: python -m lowrank_kernels.tune writes one'}")
        calibration = tuning.calibration_file(gpu)
        kept = "none: an inference form made on this GPU (fuse_) measures its own problems"
        kept = str(calibration) if calibration.exists() else kept
        print(f"{'calibration':16} {kept}")
    chosen, reason = dispatch.explain_backend(device)
    print(f"{'automatic choice':16} {chosen}: {reason}")
    return 0


if __name__ == "__main__":
    # It prints and does nothing else: where nobody reads, it ends quietly.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
