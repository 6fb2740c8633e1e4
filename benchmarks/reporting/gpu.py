"""Tables of the results of ``benchmarks.gpu`` in ``benchmarks/results/gpu``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .markdown import table

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"
ROWS = (128, 512, 4096, 16384)
RIVALS = ("dense", "torch", "triton", "cuda")
NAMES = ("dense", "two matmuls", "Triton", "CUDA C++")


@cache
def _results(card: str = "h100") -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (FOLDER / f"{card}.jsonl").read_text(encoding="utf-8").splitlines())
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
    attention = [
        one
        for card in ("h100", "h200")
        for key, one in _results(card).items()
        if key.startswith("attention/")
    ]
    tiles = [
        max(error for name, error in one["off"].items() if name.startswith("tile"))
        / one["off"].get("varlen", one["off"].get("padded"))
        for one in attention
        if one["ok"]
    ]
    wrong = len(attention) - len(tiles)
    rows.append(["Triton, attention", f"{len(tiles)}", f"{wrong}", f"{max(tiles):.2f}"])
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
                micro, later = _results()[f"micro/{key}"], _results()[f"clusters/{key}"]
                used += [micro, later]
                times = {name: later["us"][name] for name in ("dense", "torch")}
                times["cuda"] = later["us"]["free"]
                if "ms" in micro["rivals"].get("triton", {}):
                    times["triton"] = micro["rivals"]["triton"]["ms"] * 1e3
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
    """BERT-base's shapes by plans of units, in CUDA graphs, beside compiled models."""
    large, small = (_results()[f"compiled/{point}"] for point in ("32x128", "1x128"))
    rival = large["rows"]["dense, dense, compiled, graph"]["ms"]
    rows = []
    for name, row in sorted(large["rows"].items(), key=lambda item: item[1]["ms"]):
        if not name.endswith("graph"):
            continue
        few = small["rows"].get(name, {}).get("ms")
        title = name.removesuffix(", graph").replace("unfused, torch", "unfused")
        for asked, shown in ((", torch", ", library calls"), (", auto", ", calibrated")):
            title = title.replace(asked, shown)
        title = title.replace("dense, dense", "dense, unfused")
        cells = [
            f"{row['ms']:.2f}",
            f"{rival / row['ms']:.2f}x",
            "" if few is None else f"{few:.2f}",
        ]
        rows.append([title, *cells])
    head = ["ms", "32 x 128", "over compiled dense", "1 x 128"]
    return f"{table(head, rows)}\n\n{_stamp(large, small)}"


def attention() -> str:
    """One kernel for heads of any size against what the library has for them, microseconds."""
    rows, used = [], []
    for point in ("1x32", "32xmix", "32x128", "128x128"):
        for heads in ("12x64x64", "8x32x48", "4x16x32"):
            one = _results("h200").get(f"attention/{point}/{heads}")
            if one is None:
                continue
            used.append(one)
            cells = []
            for mode in ("us", "eager_us"):
                times = one[mode]
                mine = min(time for name, time in times.items() if name.startswith("tile"))
                other = min(time for name, time in times.items() if not name.startswith("tile"))
                cells += [f"{other:.1f}", f"{mine:.1f}", f"{other / mine:.1f}x"]
            count, score, value = heads.split("x")
            rows.append([point.replace("x", " x ", 1), f"{count} of {score} and {value}", *cells])
    head = ["batch", "heads", "library", "kernel", "", "library, eager", "kernel, eager", ""]
    return f"{table(head, rows)}\n\n{_stamp(*used)}"


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
    """What CUDA graphs by bucket save the host, dense and by plans of units."""
    rows, used = [], []
    for name in ("dense", "structured 0.25", "structured 0.125"):
        for point in ("1x32", "8xmix", "32xmix", "32x128"):
            found = _results("h200")[f"graphs/{point}/{name}"]
            used.append(found)
            times = list(found["ms"].values())
            cells = [*(f"{ms:.2f}" for ms in times), f"{times[0] / times[2]:.1f}x"]
            rows.append([name, point.replace("x", " x ", 1), *cells])
    head = ["model", "batch", *(f"{form}, ms" for form in found["ms"]), "over unfused, eager"]
    return f"{table(head, rows)}\n\n{_stamp(*used)}"
