"""Write the operators as a folder of the ``kernels`` library, which loads it by path or, uploaded, from the hub.

    python -m lowrank_kernels.tools.hub_folder build-kernels

``kernels`` 0.17 reads ``build/torch-cuda`` and ``build/torch-cpu``: Python and Triton alone, without the compiled
modules. A copy is loaded under the name ``id`` of its ``metadata.json``, beside the installed package or without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Raised when an operator's arguments or results change: users of the hub ask for it.
VERSION = 1
BACKENDS = ("cuda", "cpu")
# What measures and checks is for the installed package.
LEFT_OUT = ("tools", "tune.py")
# ``kernels`` finds layers as an attribute of the package.
LAYERS = "\nfrom . import layers\n"


def sources() -> dict[str, bytes]:
    """The package's Python files by their path in it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in LEFT_OUT:
            found[name.as_posix()] = path.read_bytes()
    found["__init__.py"] += LAYERS.encode()
    return found


def write(folder: Path) -> list[Path]:
    """Write one variant for each of ``BACKENDS`` under ``folder``, and return their folders.

    Raises:
        FileExistsError: the folder has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another")
    files = sources()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    variants = []
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        about = {
            "id": f"_lowrank_kernels_{backend}_{digest.hexdigest()[:12]}",
            "name": "lowrank-kernels",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        files["metadata.json"] = (json.dumps(about, indent=2) + "\n").encode()
        for name, content in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        variants.append(variant)
    return variants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_kernels.tools.hub_folder", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    try:
        variants = write(parser.parse_args(arguments).folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*variants, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
