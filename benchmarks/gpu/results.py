"""What a stage is given: the results so far, its time, and its sizes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_decomp.io.environment import commit

if TYPE_CHECKING:
    from torch import Tensor


def relative_error(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over that of what is right."""
    return ((found - right).norm() / right.norm().clamp_min(1e-30)).item()


@cache
def stamp() -> dict[str, str | None]:
    """What every result is marked with: GPU, driver, torch, triton, commit."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu, driver = None, None
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        gpu, driver = (part.strip() for part in said.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        pass
    versions = {package: version(package) for package in ("torch", "triton")}
    return {
        "gpu": gpu,
        "driver": driver,
        **versions,
        "commit": os.environ.get("COMMIT") or commit(),
    }


@dataclass(frozen=True)
class Results:
    """A JSON-lines file, a line a result: written at once, so that whatever stops the run loses nothing.

    >>> import tempfile
    >>> results = Results(Path(tempfile.mkdtemp()) / "results.jsonl")
    >>> results.add("micro/ffn", ms=0.5)
    >>> results.known()["micro/ffn"]["ms"]
    0.5
    """

    path: Path

    def add(self, key: str, **values: Any) -> None:
        """Append a result. Floats keep five digits; names are not those of the stamp."""
        assert not values.keys() & stamp().keys(), "a value would be lost to the stamp"
        line = json.dumps({"key": key, **_rounded(values), **stamp()}) + "\n"
        # One write: a reader, or a kill, meets whole lines.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, line.encode())
        os.close(handle)

    def known(self) -> dict[str, dict[str, Any]]:
        """Every result of this commit by its key, the last of each; a line that was cut short is left out."""
        result = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                one = json.loads(line)
            except ValueError:
                continue
            if one["commit"] == stamp()["commit"]:
                result[one["key"]] = one
        return result


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(name): _rounded(one) for name, one in value.items()}
    return value


@dataclass(frozen=True)
class Setting:
    """A stage's surroundings.

    Attributes:
        results: what is known; a stage adds to it and measures nothing twice.
        deadline: ``time.time()`` after which no new measurement is begun.
        width, neurons, ranks, rows: sizes of the operators.
        shape: the encoder, of ``benchmarks.bert.SHAPES``.
        points, compiled: batches as batch x length, and those that compiled models are timed at.
        dtype: of weights and inputs.
        seconds: of timing for each candidate, about.
        processes: that check results at a time; nearly all of that is Triton's compiler. 0: in this process.
    """

    results: Results
    deadline: float
    width: int = 768
    neurons: int = 3072
    ranks: tuple[int, ...] = (256, 128)
    rows: tuple[int, ...] = (4096, 512, 128, 16384, 32, 1, 65536, 2048)
    shape: str = "bert-base"
    points: tuple[str, ...] = (
        *("32x128", "1x128", "8x128", "128x128"),
        *("1x32", "32xmix", "512x128", "32x512"),
    )
    compiled: tuple[str, ...] = ("32x128", "1x128")
    dtype: str = "bfloat16"
    seconds: float = 0.03
    processes: int = 14

    def late(self, seconds: float = 0.0) -> bool:
        """Whether less than so many seconds are left."""
        return time.time() + seconds > self.deadline


# For a rehearsal in Triton's interpreter.
TOY = {
    "width": 64,
    "neurons": 96,
    "ranks": (16,),
    "rows": (5,),
    "shape": "toy",
    "points": ("2x8", "3xmix"),
    "compiled": (),
    "dtype": "float32",
    "seconds": 0.0,
    "processes": 0,
}
