"""Tables of the results of ``benchmarks.gpu`` in ``benchmarks/results/gpu``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .markdown import table

FILE = Path(__file__).resolve().parents[1] / "results" / "gpu" / "h100.jsonl"
ROWS = (128, 512, 4096, 16384, 65536)
RIVALS = ("dense", "torch", "triton", "cuda")
NAMES = ("dense", "two matmuls", "Triton", "CUDA C++")


@cache
def _results() -> dict[str, dict[str, Any]]:
    lines = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines}


def _stamp(*results: dict[str, Any]) -> str:
    first = results[0]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in results))
    libraries = f"torch {first['torch']}, triton {first['triton']}"
    return f"{first['gpu']}, driver {first['driver']}, {libraries}, commit {commits}."


def checks() -> str:
    """How many results were held to float64, by backend, and the largest error over that of library matmuls."""
    rows = []
    for backend, name in (("triton", "Triton"), ("cuda", "CUDA C++")):
        found = [one for key, one in _results().items() if key.startswith(f"correct/{backend}/")]
        right = [one for one in found if one["ok"]]
        largest = max(one["error"] / one["unfused"] for one in right)
        rows.append([name, f"{len(right)}", f"{len(found) - len(right)}", f"{largest:.2f}"])
    head = ["kernels", "right", "not run", "largest error over library matmuls"]
    return f"{table(head, rows)}\n\n{_stamp(found[0], _results()['tests'])}"


def operators() -> str:
    """Microseconds of feed-forward and linear at two ranks, the fastest low-rank form in bold."""
    rows, used = [], []
    for operator, sizes in (
        ("ffn", "768x3072x768"),
        ("linear", "768xx3072"),
        ("linear", "3072xx768"),
    ):
        for rank in (128, 256):
            for count in ROWS:
                key = f"{operator}/{sizes}/r{rank}/m{count}"
                both = [_results().get(f"{kind}/{key}") for kind in ("micro", "cuda")]
                found = [one for one in both if one is not None]
                used += found
                times = {
                    name: one["rivals"][name]["ms"] * 1e3
                    for one in found
                    for name in RIVALS
                    if "ms" in one["rivals"].get(name, {})
                }
                best = min(times[name] for name in RIVALS[1:] if name in times)
                cells = ["" if name not in times else f"{times[name]:.1f}" for name in RIVALS]
                bold = [
                    f"**{cell}**" if name != "dense" and times.get(name) == best else cell
                    for name, cell in zip(RIVALS, cells, strict=True)
                ]
                title = f"{operator} {sizes.replace('xx', 'x')}"
                rows.append([title, str(rank), str(count), *bold, f"{times['dense'] / best:.2f}x"])
    head = ["microseconds, bfloat16", "rank", "rows", *NAMES, "best over dense"]
    return f"{table(head, rows)}\n\n{_stamp(*used)}"


def norm() -> str:
    """The sum and LayerNorm in one pass."""
    rows = []
    for count in (128, 4096, 65536):
        found = _results()[f"library/m{count}"]
        us = found["us"]
        library, kernel = us["torch add + layer_norm"], us["add_norm 1 4"]
        rows.append([str(count), f"{library:.1f}", f"{kernel:.1f}", f"{library / kernel:.1f}x"])
    head = ["rows of 768", "addition and LayerNorm, us", "one pass, us", ""]
    return f"{table(head, rows)}\n\n{_stamp(found)}"


def units() -> str:
    """BERT-base's shapes by plans of units, in CUDA graphs."""
    found = _results()["units/32x128"]
    rows = []
    for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["ms"]):
        if name.endswith("graph") and ", triton," not in name:
            plain = name.replace(", torch", "").removesuffix(", graph")
            rows.append([plain, f"{row['ms']:.2f}", f"{row['over_best_dense']:.2f}x"])
    return f"{table(['32 x 128', 'ms', 'over best dense'], rows)}\n\n{_stamp(found)}"


def large() -> str:
    """The low-rank encoder at the largest batch, eager."""
    found = _results()["encoder/512x128"]
    rows = [
        [name.removesuffix(", eager"), f"{row['ms']:.1f}", f"{row['over_best_dense']:.2f}x"]
        for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["ms"])
        if name.endswith("eager")
    ]
    return f"{table(['512 x 128, eager', 'ms', 'over best dense'], rows)}\n\n{_stamp(found)}"


def graphs() -> str:
    """What CUDA graphs by bucket save the host."""
    rows = []
    for point in ("1x32", "8xmix", "32xmix", "32x128"):
        found = _results()[f"graphs/{point}"]
        times = list(found["ms"].values())
        speed = f"{times[1] / times[2]:.1f}x"
        rows.append([point.replace("x", " x ", 1), *(f"{ms:.2f}" for ms in times), speed])
    head = ["dense model, ms", *found["ms"], "graphs over eager"]
    return f"{table(head, rows)}\n\n{_stamp(found)}"
